"""Transformers: attention and mask functions, settings, guard, module."""
