"""What `aat publish` raises when it cannot go on."""

from __future__ import annotations


class PublishError(RuntimeError):
    """A file or a measured number is missing, or the Hub refuses; the message names it and the remedy."""
