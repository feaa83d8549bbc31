"""Kernels of passes over prompts: attention, and all tokens of an expert at once."""
