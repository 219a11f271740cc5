"""Calibration text, divergence, and the sensitivity estimate."""
