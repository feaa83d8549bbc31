"""Recorded routing: the file format, its recorder and its converters. No torch."""
