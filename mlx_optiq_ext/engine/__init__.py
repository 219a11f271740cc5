"""Runs requests: one thread owns MLX, one renders prompts, callers send and get plain values."""
