"""Many images: requests read from a file, generated in batches, and the names of the files that they are written to."""
