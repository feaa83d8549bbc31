"""Replay of recorded routing on a virtual clock, with the engine's own decisions. No torch."""
