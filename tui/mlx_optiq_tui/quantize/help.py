"""What the help of the quantize screen says before its keys."""

__all__ = ["HELP_TEXT"]

HELP_TEXT = """# Quantize

1. **Model**: words and Enter search the Hub (offline: the cache); a folder or a sensitivity file is opened.
   `e` measures; stopped with `x`, the same key goes on from there.
2. **Bits**: move the budget by the arrow keys, Page keys, or mouse. Each move allocates anew; `×` is how much
   further off the best uniform choice within the same budget is predicted. `f` takes a size or a memory in
   place of bits. `p` goes into the map: arrow keys choose, Space reaches further (the module of every block,
   the block), `+` and `-` pin wider and narrower, Delete frees. `d` protects the edges. `v`: other pictures.
3. **Convert**: `w` writes, verifies and scores; `y` copies that command; `s` scores, `o` opens the report.
4. **KV cache** (`k`): measures the cache of the model to serve, chooses bits for the keys and values of every
   layer, and reckons with them in what fits.

Long work goes on when this screen is left."""
