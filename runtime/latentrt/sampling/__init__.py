"""Sampling: schedules, the loop, guidance, noise and the samplers."""
