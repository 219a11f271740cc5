"""``optiq adapters``: what a running server has mounted. Each command talks HTTP and needs no MLX."""
