"""Hugging Face models without their expert weights: families, checkpoints, shapes, and the hook into the forward."""
