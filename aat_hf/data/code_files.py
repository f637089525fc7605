"""Source files with their licence: of local checkouts, and of the rows of code datasets on the Hub."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from aat_hf.data.sources import DatasetUnavailableError, fingerprint_of

UNKNOWN = "unknown"
_SPDX = re.compile(r"SPDX-License-Identifier:\s*\(?([A-Za-z0-9.+-]+)")
# What each licence's text says of itself. The first of them in a file counts: others may be quoted further down.
_PHRASES = tuple(
    (name, re.compile(phrase, re.IGNORECASE))
    for name, phrase in (
        ("AGPL", "gnu affero general public license"),
        ("LGPL", "gnu lesser general public license"),
        ("GPL", "gnu general public license"),
        ("PSF-2.0", "python software foundation license"),
        ("Apache-2.0", r"apache license,? version 2\.0"),
        ("MPL-2.0", "mozilla public license"),
        ("BSD-3-Clause", "redistribution and use in source and binary forms.*neither the names? of"),
        ("BSD-2-Clause", "redistribution and use in source and binary forms"),
        ("ISC", "permission to use, copy, modify, and(/or)? distribute this software for any purpose"),
        ("MIT", "permission is hereby granted, free of charge, to any person"),
        ("Unlicense", "this is free and unencumbered software"),
        ("CC0-1.0", r"cc0 1\.0 universal"),
    )
)
# Where the known code datasets of the Hub keep what; the first column that exists counts.
_COLUMNS = {
    "text": ("content", "code", "text", "whole_func_string"),
    "path": ("path", "max_stars_repo_path", "file_path", "func_path_in_repository"),
    "repository": ("repo_name", "max_stars_repo_name", "repository_name", "repo"),
    "license": ("license", "max_stars_repo_licenses", "licenses", "detected_licenses"),
}


@dataclass(frozen=True)
class CodeFile:
    """One source file.

    Attributes:
        repository: Name of the repository, or of the checkout's folder.
        path: Inside the repository, with "/".
        license: SPDX identifier, or "unknown".
        content: Text, or the bytes of a file that is still to be decoded.
    """

    repository: str
    path: str
    license: str
    content: str | bytes


@dataclass(frozen=True)
class Checkout:
    """A folder of source files: what git tracks when it is a work tree, else every file that is not hidden.

    Raises:
        DatasetUnavailableError: The folder does not exist or holds no file.
    """

    folder: Path

    def paths(self) -> list[Path]:
        """The files' paths, sorted; links are left out."""
        if not self.folder.is_dir():
            raise DatasetUnavailableError(f"no folder {self.folder}: give the path of a checkout")
        names = _tracked(self.folder)
        found = [self.folder / name for name in names] if names is not None else list(_walk(self.folder))
        kept = sorted(path for path in found if path.is_file() and not path.is_symlink())
        if not kept:
            raise DatasetUnavailableError(f"{self.folder} holds no files: give the path of a checkout")
        return kept

    def fingerprint(self) -> str:
        """Changes with every file's name, size and time of change."""
        states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.paths()]
        return fingerprint_of(*states)

    def files(self) -> Iterator[CodeFile]:
        """The files, read one by one."""
        for path in self.paths():
            content = path.read_bytes()
            license = _spdx(content) or _license_above(path.parent, self.folder)
            yield CodeFile(self.folder.resolve().name, path.relative_to(self.folder).as_posix(), license, content)


@dataclass(frozen=True)
class HubRows:
    """The rows of a code dataset such as codeparrot/github-code-clean or bigcode/the-stack-smol.

    Attributes:
        name: The dataset's name, the repository of rows that name none.
        rows: A `datasets.Dataset` or `IterableDataset`.
    """

    name: str
    rows: Any

    def fingerprint(self) -> str:
        """The dataset's own."""
        return fingerprint_of(self.name, getattr(self.rows, "_fingerprint", None))

    def files(self) -> Iterator[CodeFile]:
        """One file a row.

        Raises:
            DatasetUnavailableError: No column holds source text.
        """
        for number, row in enumerate(self.rows):
            content = _column(row, "text")
            if not isinstance(content, str):
                raise DatasetUnavailableError(
                    f"{self.name} is no code dataset: none of {', '.join(_COLUMNS['text'])} in its columns {list(row)}"
                )
            license = _column(row, "license")
            if isinstance(license, list):
                license = " AND ".join(sorted(license))
            repository, path = _column(row, "repository") or self.name, _column(row, "path") or f"row{number}"
            yield CodeFile(repository, path, license or UNKNOWN, content)


def decode(content: str | bytes, path: str) -> str | None:
    """The text, by Python's own rule (PEP 263) for Python and as UTF-8 for all else; None when it is not text."""
    if isinstance(content, str):
        return content
    if b"\0" in content:
        return None
    try:
        encoding = "utf-8-sig"
        if path.endswith((".py", ".pyi")):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        return content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):  # SyntaxError: an encoding that Python would refuse, too
        return None


def license_of_text(text: str) -> str:
    """SPDX identifier of a licence's text, or "unknown"; the GNU ones without version."""
    plain = " ".join(text.split())
    found = [(match.start(), name) for name, phrase in _PHRASES if (match := phrase.search(plain))]
    return min(found, key=lambda one: one[0])[1] if found else UNKNOWN  # the earlier line of the table when level


def _column(row: Mapping[str, Any], kind: str) -> Any:
    return next((row[name] for name in _COLUMNS[kind] if row.get(name) is not None), None)


def _spdx(content: bytes) -> str | None:
    """The identifier that a file states in its first lines."""
    found = _SPDX.search(content[:2000].decode("latin-1"))
    return found.group(1) if found else None


def _license_above(folder: Path, root: Path) -> str:
    """Licence of the nearest folder that has one, up to the root of the checkout."""
    for place in (folder, *folder.parents):
        if (license := _license_in(place)) != UNKNOWN or place == root:
            return license
    return UNKNOWN


@lru_cache(maxsize=4096)
def _license_in(folder: Path) -> str:
    for pattern in ("LICEN[CS]E*", "COPYING*", "licen[cs]e*"):
        for file in sorted(folder.glob(pattern)):
            if file.is_file():
                content = file.read_bytes()
                return _spdx(content) or license_of_text(content.decode("utf-8", errors="replace"))
    return UNKNOWN


def _tracked(folder: Path) -> list[str] | None:
    """Names of the files that git tracks, or None where it cannot say."""
    if not (folder / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(folder), "ls-files", "-z"], capture_output=True, check=False)
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name] if done.returncode == 0 else None


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__pycache__")))
        yield from (Path(place) / name for name in names if not name.startswith("."))
