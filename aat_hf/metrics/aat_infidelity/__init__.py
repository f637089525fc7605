"""The module `aat_infidelity.py` is for `evaluate.load`."""
