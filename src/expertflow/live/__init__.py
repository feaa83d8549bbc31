"""The predictor while the engine runs: when it predicts, where each sequence's state is, what a captured step needs."""
