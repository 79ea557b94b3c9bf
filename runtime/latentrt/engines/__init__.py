"""Engines: their records, the user's store of them, and the choice of those that run on this machine."""
