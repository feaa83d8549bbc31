"""Parts of a plan: keys and values, and the memory of a step. Pure."""
