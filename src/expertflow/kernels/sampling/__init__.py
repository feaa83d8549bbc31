"""Kernels that pick tokens."""
