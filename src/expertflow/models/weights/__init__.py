"""Where a model's weights are and how they come into memory: keys to records, files to tensors. Must not know plans, slots and caches."""
