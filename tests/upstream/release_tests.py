"""The tests folder of the installed Transformers release: fetched once with pip, never kept in this repository."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers
from filelock import FileLock

from aat_hf.data.pretrained import cache_dir

_SECONDS = 300  # for pip; a worker that waits for another one's pip waits longer


class ReleaseTestsUnavailableError(RuntimeError):
    """Upstream's tests could not be had; the message names the cause and the remedy."""


_failures: list[ReleaseTestsUnavailableError] = []


def release_tests() -> Path:
    """Folder with `test_modeling_common.py` of exactly the installed version.

    `AAT_UPSTREAM_TESTS` names it outright (the `tests` folder of a source checkout, for a version that was never
    released); else it is in the cache directory, downloaded if it is not there yet.

    Raises:
        ReleaseTestsUnavailableError: pip could not fetch the source distribution, or it has no such tests.
    """
    if named := os.environ.get("AAT_UPSTREAM_TESTS"):
        return _complete(Path(named))
    version = transformers.__version__
    target = cache_dir() / "upstream" / f"transformers-{version}"
    if not target.is_dir():
        if offline():
            raise ReleaseTestsUnavailableError(f"AAT_OFFLINE is set and {target} is not there")
        if _failures:  # asked again by the next module: pip has had its time
            raise _failures[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f"{target.name}.lock"), timeout=2 * _SECONDS):
            if not target.is_dir():  # else another worker has fetched it meanwhile
                try:
                    _fetch(version, target)
                except ReleaseTestsUnavailableError as error:
                    _failures.append(error)
                    raise
    return _complete(target)


def offline() -> bool:
    """Whether `AAT_OFFLINE` says that nothing shall be fetched."""
    return os.environ.get("AAT_OFFLINE", "0") not in ("", "0")


def _complete(folder: Path) -> Path:
    if not (folder / "test_modeling_common.py").is_file():
        raise ReleaseTestsUnavailableError(f"{folder} has no test_modeling_common.py: remove or correct it")
    return folder


def _fetch(version: str, target: Path) -> None:
    """Download the source distribution and move its tests to `target` in one step."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as scratch:
        archive = _pip_download(version, Path(scratch))
        tests = Path(scratch) / "tests"
        tests.mkdir()
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = Path(member.name).parts  # transformers-X/tests/test_*.py
                if member.isfile() and len(parts) == 3 and parts[1] == "tests" and parts[2].endswith(".py"):
                    content = tar.extractfile(member)
                    assert content is not None  # it is a file
                    (tests / parts[2]).write_bytes(content.read())
        _complete(tests).rename(target)


def _pip_download(version: str, scratch: Path) -> Path:
    """Have pip, with whatever index it is set to use, download `transformers-{version}.tar.gz`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-cache-dir", "--no-binary", "transformers", "--retries", "2", "-d", str(scratch)]
    try:
        done = subprocess.run(
            [*command, f"transformers=={version}"], capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
        log = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    except subprocess.TimeoutExpired:
        log = [f"ERROR: pip took more than {_SECONDS} seconds"]
    archive = scratch / f"transformers-{version}.tar.gz"
    if archive.is_file():
        return archive
    reason = ([line for line in log if line.startswith("ERROR")] or log[-1:] or ["pip gave no reason"])[-1]
    raise ReleaseTestsUnavailableError(
        f"could not fetch the source distribution of transformers {version} ({reason}): check the network and pip's "
        "index (pip config list), name the tests folder of a source checkout with AAT_UPSTREAM_TESTS, or set "
        "AAT_OFFLINE=1 to skip these tests"
    )
