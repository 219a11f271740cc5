"""The optiq command line: composition root."""
