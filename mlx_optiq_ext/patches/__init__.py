"""Reversible extensions of mlx-lm's own commands, one module per seam."""
