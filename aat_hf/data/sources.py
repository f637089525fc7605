"""Open datasets of the Hub and of local files, with errors that name the cause and the remedy."""

from __future__ import annotations

import hashlib
import importlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aat_hf.data.progress import notice

_LOADERS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}


class DatasetUnavailableError(RuntimeError):
    """A dataset could not be had; the message names the cause and the remedy."""


class MissingLibraryError(ImportError):
    """A library that only an extra of this package installs is missing; the message holds the pip line."""


def optional_module(name: str, extra: str = "train") -> Any:
    """Import a library that only an extra of this package installs.

    Raises:
        MissingLibraryError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibraryError(f"{name} is missing ({error}): pip install 'aat-hf[{extra}]'") from error


def load_hub(
    repository: str,
    name: str | None = None,
    *,
    split: str = "train",
    streaming: bool = False,
    refresh: bool = False,
) -> Any:
    """One split of a dataset on the Hub; without a network, of the copy in the cache of `datasets`.

    Args:
        repository: Such as "Salesforce/wikitext".
        name: The dataset's configuration.
        split: Such as "train" or "train[:10%]".
        streaming: Read while iterating, storing nothing.
        refresh: Download and prepare again, replacing a damaged copy in the cache.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` when streaming.

    Raises:
        DatasetUnavailableError: It does not exist, cannot be reached, or its cached copy is damaged.
    """
    datasets = optional_module("datasets")
    mode = "force_redownload" if refresh else None
    with _explained(f"dataset {repository}"), _offline_unless_reachable(repository):
        return datasets.load_dataset(repository, name, split=split, streaming=streaming, download_mode=mode)


def load_files(files: Sequence[Path], *, split: str = "train", streaming: bool = False) -> Any:
    """Local files as one split: Parquet, Arrow, JSON or CSV by suffix, anything else as lines of UTF-8 text.

    Raises:
        DatasetUnavailableError: No file, files of different kinds, an empty or a damaged one.
    """
    datasets = optional_module("datasets")
    for file in files:
        if not file.is_file():
            raise DatasetUnavailableError(f"no file {file}: check the path")
        if file.stat().st_size == 0:
            raise DatasetUnavailableError(f"{file} is empty: fetch it again, or leave it out")
    kinds = {_LOADERS.get(file.suffix.lower(), "text") for file in files}
    if len(kinds) != 1:
        raise DatasetUnavailableError(f"{len(files)} files of kinds {sorted(kinds)}: give files of one kind")
    data_files = {split.split("[")[0]: [str(file) for file in files]}
    with _explained(", ".join(map(str, files))):
        return datasets.load_dataset(kinds.pop(), data_files=data_files, split=split, streaming=streaming)


def generated(rows: Any, fingerprint: str, *, streaming: bool, **arguments: Any) -> Any:
    """What the generator function `rows(**arguments)` yields, as a dataset on disk or a stream.

    Args:
        rows: A function of a module, which yields one dict per row.
        fingerprint: Changes whenever the rows would; names the dataset in the cache.
        streaming: Run the function while iterating instead.
        arguments: For `rows`; no lists, which `datasets` would take for shards.
    """
    datasets = optional_module("datasets")
    if streaming:
        return datasets.IterableDataset.from_generator(rows, gen_kwargs=arguments)
    with _explained("a dataset in the cache"):
        return datasets.Dataset.from_generator(rows, gen_kwargs=arguments, fingerprint=fingerprint)


def fingerprint_of(*parts: object) -> str:
    """A short digest of the parts' representations."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:32]


def reachable(url: str, seconds: float = 3.0) -> bool:
    """Whether a server answers in time, whatever it says; a thread bounds what a socket's timeout does not (DNS)."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
                answered.set()
        except urllib.error.HTTPError as error:  # an answer, too
            error.close()
            answered.set()
        except (OSError, ValueError):  # unreachable, refused, or a malformed address
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


@contextmanager
def _offline_unless_reachable(repository: str) -> Iterator[None]:
    """Tell `datasets` when the Hub does not answer: it would retry for half a minute before it looks into its cache."""
    config = optional_module("datasets.config")
    before = config.HF_HUB_OFFLINE
    if not before and not reachable(f"{config.HF_ENDPOINT}/datasets/{repository}/resolve/main/README.md"):
        notice(f"{config.HF_ENDPOINT} does not answer: looking for {repository} in the local cache")
        config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the many errors of `datasets` and its file formats into one that says what to do."""
    exceptions, arrow = optional_module("datasets.exceptions"), optional_module("pyarrow")
    cache = optional_module("datasets.config").HF_DATASETS_CACHE
    try:
        yield
    except exceptions.DatasetNotFoundError as error:
        remedy = "check its name; a gated or private one needs `hf auth login`"
        raise DatasetUnavailableError(f"{what} was not found ({_first_line(error)}): {remedy}") from error
    except ConnectionError as error:
        remedy = "connect to the network once, or give local files (path=)"
        raise DatasetUnavailableError(f"{what} is not in {cache}, and the Hub cannot be reached: {remedy}") from error
    except exceptions.DatasetGenerationError as error:
        cause = error.__cause__
        if isinstance(cause, (arrow.ArrowException, ValueError, OSError, EOFError)):
            raise _damaged(what, cause) from error
        raise cause or error from None  # the rows' own error, or a bug
    except (arrow.ArrowException, EOFError, UnicodeDecodeError) as error:
        raise _damaged(what, error) from error
    except (ValueError, OSError) as error:  # an unknown configuration or split, a full disk; the message says which
        if type(error) is OSError and error.errno is None:  # Arrow's own, of a file that ends too early
            raise _damaged(what, error) from error
        raise DatasetUnavailableError(f"{what} cannot be loaded: {_first_line(error)}") from error


def _damaged(what: str, cause: BaseException) -> DatasetUnavailableError:
    cache = optional_module("datasets.config").HF_DATASETS_CACHE
    remedy = f"fetch the files again; if they are good, pass refresh=True or move its folder out of {cache}"
    return DatasetUnavailableError(f"{what} or its cached copy is damaged ({_first_line(cause)}): {remedy}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
