"""The server of a federation: it moves bytes between runs and agents, and holds no records."""
