"""Carrying out steps: on the host, layer by layer, or as captured CUDA graphs."""
