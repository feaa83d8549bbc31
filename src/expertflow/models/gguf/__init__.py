"""GGUF files: metadata and tensors as a config and a checkpoint in transformers' names."""
