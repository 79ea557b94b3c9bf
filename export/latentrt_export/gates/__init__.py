"""Gates: each graph compared with its reference."""
