"""Attention over latents, which stay compressed."""
