"""Everything that makes Novella: corpus, tokenizer, training, export and model card."""
