"""Traceable torch modules, one for each component."""
