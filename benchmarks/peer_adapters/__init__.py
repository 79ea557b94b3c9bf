"""Adapters: each module runs one peer in its own process, with that peer's Python (`protocol.py`)."""
