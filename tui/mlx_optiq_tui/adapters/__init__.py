"""The screen that mounts adapters and compares what they say."""
