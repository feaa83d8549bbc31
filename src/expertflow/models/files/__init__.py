"""Checkpoint folders: tensors, hashes, what is refused."""
