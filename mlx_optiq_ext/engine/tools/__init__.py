"""Tool calls in generated text: found, read while they are written, repaired where that is unambiguous."""
