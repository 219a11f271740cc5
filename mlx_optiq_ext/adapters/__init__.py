"""Low-rank adapters on a model that serves: many mounted at once, each row of a batch with its own."""
