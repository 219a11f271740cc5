"""Where models come from and go to: the Hugging Face Hub and local folders; no MLX."""
