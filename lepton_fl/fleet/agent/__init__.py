"""A site's agent: one warm process that obeys its own institution."""
