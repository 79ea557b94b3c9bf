"""Image files: reading, writing, metadata, contact sheets."""
