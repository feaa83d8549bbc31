"""Kernels that pick the next tokens of all sequences of a step, and their reference."""
