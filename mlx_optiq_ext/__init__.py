"""Sensitivity-driven mixed-precision quantization for MLX. Importing this package changes nothing."""

__version__ = "0.1.0"

__all__ = ["__version__"]
