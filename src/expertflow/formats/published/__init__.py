"""How checkpoints of FP8, int8 and NVFP4 are published, and what their configs state. Must not know models, devices and kernels."""
