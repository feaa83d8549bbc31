"""Snapshots of the engine between two steps, and the live page."""
