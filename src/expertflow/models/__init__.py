"""Hugging Face models without their expert weights: families, checkpoints, shapes, and how experts are put into the forward."""
