"""Each module runs one peer in a process of its own, with that peer's Python; `protocol.py` says what is measured."""
