"""From a sensitivity table to a mixed-precision MLX checkpoint."""
