"""Every command runs from end to end, on a model that is made in a moment, with the smallest settings."""
