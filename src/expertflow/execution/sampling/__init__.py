"""Penalties, masks and log-probabilities."""
