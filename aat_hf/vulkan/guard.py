"""The first use of a binding on a device happens in a process of its own: a crash there disables it here.

The verdict is kept in the cache directory, by binding, device and driver, so that it is reached once per machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from aat_hf.data.pretrained import cache_dir
from aat_hf.vulkan.errors import VulkanUnavailableError
from aat_hf.vulkan.interface import DeviceInfo, shader_code

logger = logging.getLogger(__name__)

SMOKE_SHADER = "smoke"
PACKAGES = {"kompute": "kp", "vulkan": "vulkan"}  # provider: the package it imports, best first
_SECONDS = 180  # a software driver compiles for seconds, on a busy machine
_OTHER = {"kompute": "vulkan", "vulkan": "kompute"}

# First lines of a process that needs aat_hf.vulkan alone: to import all of aat_hf, with torch, takes seconds.
BARE = f"""
import sys, types
for name, folder in (("aat_hf", ""), ("aat_hf.data", "/data")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(Path(__file__).parents[1])!r} + folder]
"""


class Verdict(NamedTuple):
    """How a smoke test ended.

    Attributes:
        passed: whether the binding may be used; reason: what happened otherwise.
    """

    passed: bool
    reason: str = ""


@lru_cache(maxsize=32)
def check(provider: str, device: DeviceInfo) -> None:
    """Let a provider be used on a device.

    Raises:
        VulkanUnavailableError: it failed its smoke test, now or earlier on this machine.
    """
    path, verdict = verdict_path(provider, device), remembered(provider, device)
    if verdict is None:
        verdict = smoke_test(provider, device.index)
        _write(path, verdict)
    if not verdict.passed:
        raise VulkanUnavailableError(
            f"provider {provider!r} failed its smoke test on {device.name} ({verdict.reason}): update the driver, or "
            f"set AAT_VULKAN_PROVIDER={_OTHER[provider]}; deleting {path} tests it again"
        )


def remembered(provider: str, device: DeviceInfo) -> Verdict | None:
    """The verdict of an earlier smoke test."""
    return _read(verdict_path(provider, device))


def smoke_test(provider: str, index: int) -> Verdict:
    """Run a small computation in a process of its own."""
    command = [sys.executable, "-c", f"{BARE}\nfrom aat_hf.vulkan import smoke; smoke.main(*sys.argv[1:])"]
    command += [provider, str(index)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds what this one found
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"it did not end within {_SECONDS} s")
    except OSError as error:
        return Verdict(False, f"it could not be started: {error}")
    if done.returncode == 0:
        return Verdict(True)
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    ended = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    return Verdict(False, f"{ended}: {last}")


def verdict_path(provider: str, device: DeviceInfo) -> Path:
    """Where the verdict on this binding, device, driver and shader is kept."""
    identity = (
        provider,
        _version(PACKAGES[provider]),
        device.index,
        device.name,
        device.api_version,
        device.driver,
        device.vendor_id,
        device.device_id,
        hashlib.sha256(shader_code(SMOKE_SHADER)).hexdigest(),
    )
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return cache_dir() / "vulkan" / f"smoke-{provider}-{digest}.json"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""  # built in place


def _read(path: Path) -> Verdict | None:
    try:
        found = json.loads(path.read_text())
        return Verdict(bool(found["passed"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not tested yet, or the file is damaged


def _write(path: Path, verdict: Verdict) -> None:
    """Keep it; another process may do the same at the same time."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(verdict._asdict()))
        draft.replace(path)
    except OSError as error:
        logger.warning("cannot keep the result of a Vulkan smoke test (%s): it runs again in every process", error)
