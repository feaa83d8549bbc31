"""GPU kernels, each beside its torch reference."""
