"""The cache's decisions on the device, as Triton kernels and their reference."""
