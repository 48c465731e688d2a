"""The check of a machine with a GPU that ``make gpu-check`` runs."""
