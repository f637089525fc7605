"""Source code to train on: code datasets of the Hub by name, and local git checkouts, filtered alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from aat_hf.data.code_files import Checkout, HubRows
from aat_hf.data.code_filters import CodeFilters, filter_code
from aat_hf.data.progress import notice
from aat_hf.data.sources import DatasetUnavailableError, fingerprint_of, generated, load_hub

_FILTERS_VERSION = 1  # raised when the same files and filters give other rows, so that caches are made anew


def load_github(
    sources: str | Path | Sequence[str | Path],
    *,
    name: str | None = None,
    split: str = "train",
    filters: CodeFilters | None = None,
    streaming: bool = False,
    refresh: bool = False,
) -> Any:
    """Source files that pass the filters, duplicates counted over all sources.

    Args:
        sources: Folders (git checkouts or any other) and names of code datasets on the Hub, such as
            "codeparrot/github-code-clean"; one or several. A string that names a folder is one.
        name: Configuration of the Hub's datasets.
        split: Split of the Hub's datasets.
        filters: What a file must be; `CodeFilters()` when None.
        streaming: Read while iterating, storing nothing; exact and near duplicates are still found.
        refresh: Download the Hub's datasets again.

    Returns:
        A `datasets.Dataset` (`IterableDataset` when streaming) with the columns text, path, repository, license and
        sha256. How many files were left out, and why, is told on stderr.

    Raises:
        DatasetUnavailableError: A source does not exist or cannot be reached, or no file passed.
        ImportError: `datasets`, `datasketch` or `detect-secrets` is not installed.
    """
    filters = filters or CodeFilters()
    listed = [sources] if isinstance(sources, str | Path) else list(sources)
    if not listed:
        raise DatasetUnavailableError("no sources: give folders or names of datasets on the Hub")
    opened = tuple(_open(one, name, split, streaming, refresh) for one in listed)
    fingerprint = "" if streaming else fingerprint_of(_FILTERS_VERSION, filters, *(s.fingerprint() for s in opened))
    return generated(_rows, fingerprint, streaming=streaming, sources=opened, filters=filters)


def _open(source: str | Path, name: str | None, split: str, streaming: bool, refresh: bool) -> Checkout | HubRows:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Checkout(folder)
    text = str(source)
    if isinstance(source, Path) or text.count("/") != 1 or text.startswith((".", "~", "/")):
        raise DatasetUnavailableError(
            f"no folder {source}: give a checkout, or a dataset on the Hub such as codeparrot/codeparrot-clean"
        )
    return HubRows(text, load_hub(text, name, split=split, streaming=streaming, refresh=refresh))


def _rows(sources: Sequence[Checkout | HubRows], filters: CodeFilters) -> Iterator[dict[str, str]]:
    """Called by `datasets`, which stores what it yields."""
    dropped: Counter[str] = Counter()
    kept = 0
    files = chain.from_iterable(source.files() for source in sources)
    for row in filter_code(files, filters, dropped):
        kept += 1
        yield row
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
    notice(f"{kept} of {kept + dropped.total()} files kept; left out: {reasons or 'none'}")
    if not kept:
        raise DatasetUnavailableError(
            f"no file passed the filters (left out: {reasons}): loosen them (licenses=None keeps any licence)"
        )
