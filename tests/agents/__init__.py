"""Real clients, installed by ``make test-clients``, against a live server."""
