"""The screen that shows what a server is doing."""
