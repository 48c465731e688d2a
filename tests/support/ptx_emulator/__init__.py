"""A functional emulator of PTX: runs what Triton compiles for an NVIDIA GPU on the memory of CPU tensors.

A kernel's PTX becomes a Python function of one warp (`translation`), whose registers hold the values of 32 lanes. The
warps of some blocks take turns in a random order (`grid`), on global and shared memory that know who touched each byte
when (`global_memory`, `shared_memory`). So the emulator finds wrong bits, and also what a GPU would do right only by
luck: races, missing barriers and fences, accesses out of bounds, values that nobody wrote. An instruction or modifier
that it does not know is an error, never skipped. Numbers of sections are those of the PTX ISA 8.8.

What it does not show: what ptxas makes of the PTX, how hardware behaves, how long anything takes.
"""
