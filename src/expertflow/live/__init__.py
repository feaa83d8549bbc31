"""The predictor while the engine runs: which batch comes, what is predicted for it, when it is asked."""
