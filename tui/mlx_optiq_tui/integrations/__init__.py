"""The screen that connects clients to the server."""
