"""Building blocks of a decoder layer, for the few tokens of a decode step: `reference` in plain torch, a twin of each beside it."""
