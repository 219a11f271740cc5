"""The dashboard without a server and without a model: a recording of one, and what it answers."""
