"""Machine code of the Triton kernels that comes with the package, launched through the NVIDIA driver."""
