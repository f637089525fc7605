"""Long real texts: source of the standard library and of installed packages, a user's file, Jane Austen."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aat_hf.data.pretrained import cache_dir

_MODULES = (
    "argparse",
    "ast",
    "collections/__init__",
    "configparser",
    "dataclasses",
    "datetime",
    "difflib",
    "doctest",
    "tarfile",
    "typing",
    "zipfile/__init__",
)
_NO_SOURCE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_NOVELS = {
    "Emma": "emma",
    "Mansfield Park": "mansfieldpark",
    "Northanger Abbey": "northangerabbey",
    "Persuasion": "persuasion",
    "Pride and Prejudice": "prideprejudice",
    "Sense and Sensibility": "sensesensibility",
}
_PACKAGE = "r-cran-janeaustenr"


class TextUnavailableError(RuntimeError):
    """A text could not be had; the message names the cause and the remedy."""


def stdlib_source(min_chars: int = 0) -> str:
    """Source of standard library modules, joined in a fixed order.

    The order is argparse, ast, collections, configparser, dataclasses, ... and, when these do not
    suffice, every other top-level module by name, then those in packages, tests left out. One Python
    version always gives the same text.

    Args:
        min_chars: Join whole modules until the text is at least this long; at least one is taken.

    Raises:
        TextUnavailableError: This Python carries no source, or less than was asked for.
    """
    root = Path(sysconfig.get_path("stdlib"))
    listed = [root / f"{name}.py" for name in _MODULES]
    listed += [root / f"{name.split('/')[0]}.py" for name in _MODULES if "/" in name]
    rest = sorted(path for path in root.glob("*.py") if path not in listed)
    rest += [path for path in _modules(root) if path.parent != root and path not in listed]
    pieces: list[str] = []
    length = 0
    for path in [*listed, *rest]:
        if pieces and length >= min_chars:
            break
        if path.is_file():
            pieces.append(path.read_text("utf-8", errors="replace"))
            length += len(pieces[-1]) + 1
    text = "\n".join(pieces)
    if not text or len(text) < min_chars:
        raise TextUnavailableError(
            f"the standard library in {root} has {len(text)} characters of source, {min_chars} are "
            "needed: give a text file of your own (--text FILE)"
        )
    return text


def package_sources(names: Sequence[str], min_chars: int = 2_000_000) -> Iterator[str]:
    """Source of installed packages in documents of whole modules, joined in the order of their paths, without tests.

    One version of a package always gives the same documents.

    Args:
        names: Of the packages, as they are imported.
        min_chars: Length from which a document is closed; the last of a package can be shorter.

    Raises:
        TextUnavailableError: A package is not installed, or carries no source.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        modules = [path for root in (spec and spec.submodule_search_locations) or () for path in _modules(Path(root))]
        if not modules:
            raise TextUnavailableError(f"no source of a package {name!r} is installed: pip install {name}")
        pieces: list[str] = []
        length = 0
        for path in modules:
            pieces.append(path.read_text("utf-8", errors="replace"))
            length += len(pieces[-1]) + 1
            if length >= min_chars or path is modules[-1]:
                yield "\n".join(pieces)
                pieces, length = [], 0


def _modules(root: Path) -> list[Path]:
    """Python files below a folder by path, tests and other packages' left out."""
    return sorted(path for path in root.glob("**/*.py") if not _NO_SOURCE & set(path.relative_to(root).parts))


def read_text(path: str | Path | None = None, min_chars: int = 0) -> str:
    """A file's text (UTF-8), or the standard library's source when no file is named.

    Args:
        path: The file, or None.
        min_chars: Least length of the default text; a file is taken as it is.

    Raises:
        TextUnavailableError: The file cannot be read.
    """
    if path is None:
        return stdlib_source(min_chars)
    try:
        return Path(path).expanduser().read_text("utf-8", errors="replace")
    except OSError as error:
        raise TextUnavailableError(
            f"cannot read {path} ({error.strerror or error}): give the path of a UTF-8 text file"
        ) from error


def austen(title: str = "Emma") -> str:
    """A novel by Jane Austen (public domain), for benchmarks on prose.

    It comes from the Debian package `r-cran-janeaustenr`, which is downloaded and unpacked into the
    cache, not installed; reading it needs `pip install rdata`.

    Raises:
        TextUnavailableError: No such novel, not a Debian-like system, or a tool is missing.
    """
    if title not in _NOVELS:
        raise TextUnavailableError(f"no novel {title!r}: choose one of {', '.join(_NOVELS)}")
    cached = cache_dir() / "texts" / f"{_NOVELS[title]}.txt"
    if not cached.is_file():
        with tempfile.TemporaryDirectory() as scratch:
            base = _unpack_debian(Path(scratch))
            text = _read_lazy_load(base, _NOVELS[title])
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_suffix(".part")
        part.write_text(text, "utf-8")
        part.replace(cached)
    return cached.read_text("utf-8")


def _unpack_debian(scratch: Path) -> Path:
    """Download and unpack the package; the path of its lazy-load database without suffix."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise TextUnavailableError(
                f"{tool} is missing: Austen's novels are read from the Debian package {_PACKAGE}; "
                "elsewhere, give a text file of your own"
            )
    _run(["apt-get", "download", _PACKAGE], scratch)
    archives = list(scratch.glob("*.deb"))
    if not archives:
        raise TextUnavailableError(f"apt-get left no {_PACKAGE}: run apt-get update and try again")
    _run(["dpkg", "-x", str(archives[0]), "unpacked"], scratch)
    return scratch / "unpacked/usr/lib/R/site-library/janeaustenr/data/Rdata"


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TextUnavailableError(f"{' '.join(command[:2])} failed ({reason}): run apt-get update and try again")


def _read_lazy_load(base: Path, name: str) -> str:
    """Read one character vector from R's lazy-load database (`.rdx` index, `.rdb` data)."""
    try:
        import rdata
    except ImportError as error:
        raise TextUnavailableError("reading Austen needs rdata: pip install rdata") from error
    index: Mapping[str, Any] = rdata.read_rds(base.with_suffix(".rdx"))
    offset, length = (int(number) for number in index["variables"][name])
    record = base.with_suffix(".rdb").read_bytes()[offset : offset + length]
    # Four bytes of length, big-endian, then a zlib stream holding the serialised vector.
    data = zlib.decompress(record[4:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unknown file type: assumed RDS")  # as it is
        lines = rdata.conversion.convert(rdata.parser.parse_data(data))
    return "\n".join(str(line) for line in lines)
