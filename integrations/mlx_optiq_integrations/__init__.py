"""Client configuration renderers; begins with the facts every snippet needs."""
