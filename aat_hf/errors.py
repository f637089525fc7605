"""Errors that name their cause and remedy."""

from __future__ import annotations


class UnsupportedAttentionError(NotImplementedError):
    """A model asks for something that tiled attention would get wrong; the message says what and what to do."""
