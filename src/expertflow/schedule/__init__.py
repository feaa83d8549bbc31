"""Which live sequences step together."""
