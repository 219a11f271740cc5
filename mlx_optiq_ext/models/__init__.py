"""Module trees of mlx-lm: load, list units, run block by block."""
