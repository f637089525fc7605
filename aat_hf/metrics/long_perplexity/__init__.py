"""The module `long_perplexity.py` is for `evaluate.load`."""
