"""Checkpoints: layouts, weight files, tokenizers and documents."""
