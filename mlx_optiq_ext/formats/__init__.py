"""Bytes on disk to types and back; no MLX."""
