"""One module a client, each with a ``CLIENT``; found by name, so that adding one is adding its file."""
