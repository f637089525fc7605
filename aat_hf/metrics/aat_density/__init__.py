"""The module `aat_density.py` is for `evaluate.load`."""
