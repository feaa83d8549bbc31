"""Penalties, masks, logprobs."""
