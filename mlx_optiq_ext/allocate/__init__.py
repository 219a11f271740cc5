"""Budget solver: pure Python, knows nothing of models."""
