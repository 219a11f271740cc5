"""Grammars of answers: text in, text out. Nothing here knows a model, a tokenizer library or a thread."""
