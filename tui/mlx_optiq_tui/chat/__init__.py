"""Talk to the served model: conversations, tools with consent, and the sandbox that they run in."""
