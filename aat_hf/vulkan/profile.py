"""What `aat calibrate` measured on a Vulkan device: workgroup shapes, and from where on the device is the faster one.

Kept as `vulkan-<device>.json` beside the router's profile; `AAT_PROFILE=none` ignores it.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from aat_hf.data.pretrained import cache_dir
from aat_hf.tiling.tile_map import EXACT, TileMap
from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.interface import DeviceInfo
from aat_hf.vulkan.lowering import joinable, joined_numbers
from aat_hf.vulkan.shapes import OTHER, Shape, candidates

VERSION = 2
_MARGIN = 0.9  # of the CPU's time, above which moving the work is not worth it
_OF_QUERIES, _OF_KEYS = 3, 4  # matrix products of the backward shaders: for dQ; for dK and dV
_log = logging.getLogger("aat_hf")


@dataclass(frozen=True)
class Direction:
    """Seconds of a computation: a call, a byte moved, a product (attention: of one query and one key element).

    `cpu_product` is the CPU's time for such a product on this machine. An element-wise operation has one an element.
    """

    call: float
    byte: float
    product: float
    cpu_product: float

    def pays(self, moved: float, products: float, padding: float = 1.0) -> bool:
        """Whether the device is the faster one, transfers included; it computes `padding` times the products."""
        on_device = self.call + moved * self.byte + padding * products * self.product
        return on_device < _MARGIN * products * self.cpu_product


@dataclass(frozen=True)
class Costs:
    """Costs of attention measured for a dtype and a head dimension."""

    dtype: str
    head_dim: int
    forward: Direction
    backward: Direction


class Profile(NamedTuple):
    """What was measured: workgroup shapes by `key`, costs of attention, and of plain operations by name."""

    shapes: dict[str, Shape]
    costs: list[Costs]
    operations: dict[str, Direction]

    @classmethod
    def empty(cls) -> Profile:
        """Nothing was measured."""
        return cls({}, [], {})


def path(device: DeviceInfo) -> Path:
    """The file of a device."""
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return cache_dir() / f"vulkan-{name}-{device.vendor_id:04x}-{device.device_id:04x}.json"


def save(device: DeviceInfo, profile: Profile) -> Path:
    """Write a profile and forget those in memory."""
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "version": VERSION,
        "driver": device.driver,
        "shapes": {name: [shape.threads, shape.rows, shape.chunk] for name, shape in profile.shapes.items()},
        "costs": [asdict(entry) for entry in profile.costs],
        "operations": {name: asdict(costs) for name, costs in profile.operations.items()},
    }
    part = file.with_suffix(".part")
    part.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    part.replace(file)
    load.cache_clear()
    measured.cache_clear()
    return file


@lru_cache(maxsize=8)
def load(device: DeviceInfo) -> Profile:
    """The profile of a device, empty when it was not measured with this driver."""
    file = path(device)
    if os.environ.get("AAT_PROFILE", "").lower() == "none" or not file.is_file():
        return Profile.empty()
    try:
        stored = json.loads(file.read_text("utf-8"))
        if stored["version"] != VERSION or stored["driver"] != device.driver:
            return Profile.empty()
        shapes = {name: Shape(*map(int, values)) for name, values in stored["shapes"].items()}
        operations = {str(name): _direction(costs) for name, costs in stored["operations"].items()}
        return Profile(shapes, [_costs(entry) for entry in stored["costs"]], operations)
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used (%s): run `aat calibrate --device vulkan`, or remove it", file, error)
        return Profile.empty()


def shape(device: DeviceInfo, role: str, head_vectors: int, value_vectors: int, tile: int) -> Shape:
    """The measured shape if it fits, else the first candidate, none that owns more rows than a `tile` has if possible.

    Raises:
        VulkanLimitError: no shape fits the device.
    """
    offered = candidates(device, role, head_vectors, value_vectors)
    fitting = [shape for shape in offered if shape.own <= tile] or offered
    measured = load(device).shapes.get(key(role, head_vectors, value_vectors))
    return measured if measured is not None and measured in fitting else fitting[0]


def key(role: str, head_vectors: int, value_vectors: int) -> str:
    """Name of a shape in the profile."""
    return f"{role}-{head_vectors}-{value_vectors}"


def pays(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> bool:
    """Whether the Vulkan device was measured to be faster than the CPU for a call, forward and backward.

    Never for tensors on another device, and never on a software driver. The answer is the same with and without
    gradients: a recomputed forward pass must not change its path.
    """
    if q.device.type != "cpu":
        return False
    dtype = str(q.dtype).removeprefix("torch.")
    known = [entry for entry in measured().costs if entry.dtype == dtype]
    if not known:
        return False
    nearest = min(known, key=lambda entry: abs(entry.head_dim - q.shape[3]))
    load, (forward, backward) = load_of(q, k, v, tile_map), paddings_of(tile_map)
    return nearest.forward.pays(*load, forward) and nearest.backward.pays(*load, backward)


def load_of(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> tuple[float, float]:
    """Bytes of the tensors, and products of the exact tiles."""
    pairs = int((tile_map.levels == EXACT).sum()) * tile_map.query_tile * tile_map.key_tile
    return float(sum(x.numel() * x.element_size() for x in (q, k, v))), float(pairs) * (q.shape[3] + v.shape[3])


def paddings_of(tile_map: TileMap) -> tuple[float, float]:
    """How many products the shaders compute for one of an exact tile, forward and backward.

    Those that own queries take whole blocks of keys, in which narrow tiles are joined; those that own keys take single
    tiles.
    """
    exact, key_tile = tile_map.levels == EXACT, tile_map.key_tile
    rows, columns = tile_map.rows[exact].numpy(), tile_map.columns[exact].numpy()
    if not len(columns):
        return 1.0, 1.0
    count = joinable(key_tile)
    joined = int(joined_numbers(rows, columns, count)[-1]) + 1
    of_queries = joined * _rounded(count * key_tile, OTHER) / (len(columns) * key_tile)
    own = min(OTHER, 1 << key_tile.bit_length() - 1)  # a workgroup has a power of two, and no more than a tile has
    of_keys = _rounded(key_tile, own) / key_tile
    return of_queries, (_OF_QUERIES * of_queries + _OF_KEYS * of_keys) / (_OF_QUERIES + _OF_KEYS)


def _rounded(keys: int, block: int) -> int:
    return -(-keys // block) * block


@lru_cache(maxsize=1)
def measured() -> Profile:
    """Of the device in use; empty when no device was measured, or it is a software driver."""
    if os.environ.get("AAT_PROFILE", "").lower() == "none" or not any(cache_dir().glob("vulkan-*.json")):
        return Profile.empty()
    from aat_hf.vulkan.provider import get_provider  # opens the device: only where it was measured

    try:
        device = get_provider().device
    except VulkanError as error:
        _log.warning("a Vulkan device was measured, but none is used: %s", error)
        return Profile.empty()
    return Profile.empty() if device.kind == "cpu" else load(device)


def _costs(entry: dict[str, Any]) -> Costs:
    return Costs(
        str(entry["dtype"]), int(entry["head_dim"]), _direction(entry["forward"]), _direction(entry["backward"])
    )


def _direction(entry: dict[str, Any]) -> Direction:
    return Direction(**{name: float(seconds) for name, seconds in entry.items()})
