"""The experts of a pass over prompts: all tokens of an expert at once."""
