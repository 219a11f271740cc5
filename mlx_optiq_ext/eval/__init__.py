"""Score checkpoints against their reference on held-out text."""
