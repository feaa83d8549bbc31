"""Recorded routing: the file format, converters, made-up traces. No torch."""
