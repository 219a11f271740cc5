"""HTTP: three APIs over one engine, without MLX."""
