"""The bundle: manifest, files and their integrity, tensor signatures, gate metrics."""
