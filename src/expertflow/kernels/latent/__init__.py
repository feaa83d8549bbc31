"""Attention over latents: keys and values stay compressed, one latent a token for all heads."""
