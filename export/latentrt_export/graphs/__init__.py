"""Graphs: tracing, rewriting, splitting and precision."""
