"""Run code that a model wrote where it reaches only a workspace; refuse where that is not possible."""
