"""The routing path predictor: which experts the coming tokens will use, before they are computed."""
