"""Graph rewrites, one file per pass."""
