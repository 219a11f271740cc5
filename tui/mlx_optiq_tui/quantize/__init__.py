"""The quantize screen: pick a model, measure it, choose a budget, convert, score."""
