"""Decoding: latents to pixels, in tiles or slices, and the safety check."""
