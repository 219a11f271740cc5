"""Plain data: frozen msgspec Structs, no MLX, no I/O."""
