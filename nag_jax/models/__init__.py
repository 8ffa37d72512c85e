"""The networks, in Linen: pure `init`/`apply`, parameters as plain dicts."""
