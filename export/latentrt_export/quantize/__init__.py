"""int8: calibration, ranges, per-layer methods."""
