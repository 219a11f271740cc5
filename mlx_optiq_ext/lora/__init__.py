"""Low-rank adapters: ranks from measurements, training, files, merging and fusing."""
