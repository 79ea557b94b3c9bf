"""Graph rewrites, one pass per file."""
