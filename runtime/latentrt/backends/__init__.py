"""Backends: the session interface, the libraries behind it, and which component runs where."""
