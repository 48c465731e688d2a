"""The Triton kernels: the projection on GPUs."""
