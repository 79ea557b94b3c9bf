"""Adapters: each module runs one peer in a process of its own, with that peer's Python (`protocol.py`)."""
