"""What the engine is like now, for metrics and the live page: snapshots between two steps, and the page's routes."""
