"""One module per optiq command."""
