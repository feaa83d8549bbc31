"""Answers in each API's shapes, streamed and whole."""
