"""The KV cache in mixed precision: measured, allocated, stored, attended to."""
