"""The server: HTTP in front, one thread that owns the engine behind."""
