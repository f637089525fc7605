"""Tiled or exact: decided by what the kernels cost on this machine.

The costs come from `aat calibrate`, which writes them as JSON into the cache directory, or from cautious defaults.
They decide only for `backend="auto"`; a backend that is named is used. `AAT_PROFILE=none` ignores the file.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from aat_hf.config import AATConfig
from aat_hf.data.pretrained import cache_dir

VERSION = 1
FASTER = "exact attention is faster"
_RETRY = 15  # calls of a layer after which selection is tried again


@dataclass
class _InVain:
    """A selection for nothing: the settings, and calls until it is tried again."""

    config: AATConfig
    left: int = _RETRY


_in_vain: WeakKeyDictionary[nn.Module, dict[int, _InVain]] = WeakKeyDictionary()  # by keys of a call
_log = logging.getLogger("aat_hf")


class Costs(NamedTuple):
    """What tiled attention costs in units of exact attention (SDPA) of the same call.

    Attributes:
        forward, backward: time of the tiled kernel divided by density and by SDPA's time.
        shortest: fewest keys for which selection takes less than a fifth of SDPA's time.
    """

    forward: float
    backward: float
    shortest: int


# Keys for each thread: what runs on one thread, Python, weighs more beside a faster SDPA.
_SHORTEST_PER_THREAD, _DECODE_PER_THREAD = 512, 8192
_GATHER = Costs(3.0, 3.0, 2048)  # PyTorch's own operations, on any device


def costs(device: torch.device, dtype: torch.dtype, head_dim: int) -> Costs:
    """Costs of a call: measured for its dtype and the nearest head dimension, else the defaults."""
    measured()  # forgets the cached costs when it reads the file again
    return _costs(device.type, dtype, head_dim, torch.get_num_threads())


@lru_cache(maxsize=64)
def _costs(device: str, dtype: torch.dtype, head_dim: int, threads: int) -> Costs:
    known = [entry for entry in measured() if entry["device"] == device and entry["dtype"] == _name(dtype)]
    if not known or (device == "cpu" and dtype == torch.float64):
        return default_costs(threads) if device == "cpu" and dtype != torch.float64 else _GATHER
    nearest = min(known, key=lambda entry: abs(entry["head_dim"] - head_dim))
    return Costs(nearest["forward"], nearest["backward"], nearest["shortest"])


def default_costs(threads: int) -> Costs:
    """Cautious costs of the CPU kernel on so many threads, where nothing was measured."""
    return Costs(1.0, 1.1, _SHORTEST_PER_THREAD * max(4, threads))


def shortest(config: AATConfig, device: torch.device, dtype: torch.dtype, head_dim: int) -> int:
    """Fewest keys of a call that is tiled."""
    return costs(device, dtype, head_dim).shortest if config.min_length is None else config.min_length


def decode_from(config: AATConfig) -> int:
    """Fewest keys that a single query sees for its tiles to be selected."""
    if config.decode_from is not None:
        return config.decode_from
    return _DECODE_PER_THREAD * max(2, torch.get_num_threads())


def too_dense(density: float, q: Tensor) -> str | None:
    """Why exact attention is the faster way to compute a map of this density, or None; q (..., head_dim).

    The answer is the same with and without gradients: a recomputed forward pass must not change its path.
    """
    found = costs(q.device, q.dtype, q.shape[-1])
    cost = max(found.forward, found.backward)
    return None if density * cost < 1 else f"{FASTER} at density {density:.2f} (break-even {1 / cost:.2f})"


def lost_lately(module: nn.Module, keys: int, config: AATConfig) -> bool:
    """Whether selection with these settings was in vain for the last call of `module` with so many keys.

    Now and then it is tried again. Never while training: a recomputed forward pass must not change its path.
    """
    noted = _in_vain.get(module, {}).get(keys)
    if noted is None or noted.left == 0 or module.training or noted.config != config:
        return False
    noted.left -= 1
    return True


def remember(module: nn.Module, keys: int, config: AATConfig, reason: str | None) -> None:
    """Note how a call of `module` ended."""
    if reason is not None and reason.startswith(FASTER):
        _in_vain.setdefault(module, {})[keys] = _InVain(config)


def profile_path() -> Path:
    """The file `aat calibrate` writes."""
    return cache_dir() / f"profile-{VERSION}.json"


def save(entries: list[dict[str, Any]]) -> Path:
    """Write the measured costs and forget those in memory."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"version": VERSION, "machine": machine(), "costs": entries}, indent=1) + "\n", "utf-8")
    part.replace(path)
    measured.cache_clear()
    return path


def machine() -> dict[str, str | int]:
    """What a profile was measured on; on another processor it is not used."""
    return {
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@lru_cache(maxsize=1)
def measured() -> list[dict[str, Any]]:
    """The entries of this machine's profile; none when there is no usable one."""
    _costs.cache_clear()
    if os.environ.get("AAT_PROFILE", "").lower() == "none":
        return []
    path = profile_path()
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["version"] != VERSION or stored["machine"]["processor"] != machine()["processor"]:
            return []
        for entry in stored["costs"]:
            Costs(float(entry["forward"]), float(entry["backward"]), int(entry["shortest"]))
        return list(stored["costs"])
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used (%s): run `aat calibrate`, or remove it", path, error)
        return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
