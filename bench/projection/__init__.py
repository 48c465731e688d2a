"""The op x + x @ P against a P that is stored, on a CPU and on a GPU."""
