"""Keys and values of the live sequences: how they lie, who has which page, and the caches that attention writes and reads."""
