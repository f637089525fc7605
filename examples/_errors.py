"""How an example ends when a model, a text or a library is missing: with the cause and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from aat_hf.data import DatasetUnavailableError, ModelUnavailableError, TextUnavailableError
from aat_hf.data.sources import MissingLibraryError

EXPLAINED = DatasetUnavailableError, ModelUnavailableError, TextUnavailableError, MissingLibraryError


@contextmanager
def explained() -> Iterator[None]:
    """End the process with the message of an error that says what to do; others keep their traceback."""
    try:
        yield
    except EXPLAINED as error:
        sys.exit(str(error))
