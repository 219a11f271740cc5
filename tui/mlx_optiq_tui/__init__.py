"""Terminal pictures of optiq results."""
