"""Sums over attention calls that can be added up across layers' calls and across processes, and what they say.

Nothing is read back from the device before `drain`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aat_hf.attention import TiledAttentionResult
from aat_hf.hf.settings import settings_of
from aat_hf.kernels import router
from aat_hf.kernels.reference import reference_attention
from aat_hf.quantum.entropy import head_entropy
from aat_hf.report import stages
from aat_hf.tiling.audit import Z95
from aat_hf.tiling.layout import random_rows
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import COARSE, EXACT

OBSERVABLES = ("entropy", "effective_rank")
_PATHS = ("tiled", "skip", "dense")
_ROWS = 32  # rows whose weights are computed for an observable


@dataclass
class LayerSums:
    """Sums over the calls of one layer.

    Attributes:
        name: module name; layer_idx: its index, if it has one; tolerance: the one in force.
        sums: by name: "calls", "tokens", "router", "path/..." and "ms/..." (1,), "tiles" (exact, coarse, allowed),
            "density", "rows", "infidelity", "infidelity_squared" and the observables (heads,).
    """

    name: str
    layer_idx: int | None
    tolerance: float
    sums: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, name: str) -> list[float]:
        """A sum by head divided by the number of calls: (heads,)."""
        return [value / self.sums["calls"][0] for value in self.sums[name]]

    def infidelity(self) -> list[tuple[float, float]]:
        """Mean audited infidelity and half width of its 95 % interval, for every head; empty if not audited."""
        if not self.sums.get("rows") or min(self.sums["rows"]) < 2:
            return []
        columns = (self.sums[name] for name in ("rows", "infidelity", "infidelity_squared"))
        result = []
        for rows, total, squares in zip(*columns, strict=True):
            variance = max(0.0, squares - total * total / rows) / (rows - 1)  # rounding may leave it below 0
            result.append((total / rows, Z95 * math.sqrt(variance / rows)))
        return result


class Collector:
    """A recorder of sums; it listens between `start` and `stop`.

    Args:
        model: the model whose layers are watched.
        observables: which of `OBSERVABLES` to compute as well, each from 32 rows of exact weights a call.
        timing: whether to time the stages of attention (on CUDA that synchronises).
    """

    def __init__(self, model: nn.Module, observables: Sequence[str] = (), timing: bool = True) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._observables, self._timing = tuple(observables), timing
        self._layers: dict[str, LayerSums] = {}
        self._tensors: dict[tuple[str, str], Tensor] = {}
        self._before: bool | None = None

    @property
    def listening(self) -> bool:
        """Whether calls are recorded now."""
        return self._before is not None

    @property
    def empty(self) -> bool:
        """Whether nothing was recorded since the last `drain`."""
        return not self._layers

    def start(self) -> None:
        """Listen."""
        if self._before is None:
            self._before, stages.timing = stages.timing, stages.timing or self._timing

    def stop(self) -> None:
        """Listen no longer."""
        if self._before is not None:
            stages.timing, self._before = self._before, None

    def watches(self, module: nn.Module) -> bool:
        """Whether `module` is of the model and this listens."""
        return self.listening and id(module) in self._names

    def drain(self) -> list[LayerSums]:
        """The sums so far, in plain numbers; start afresh."""
        for (name, key), tensor in self._tensors.items():
            self._layers[name].sums[key] = tensor.tolist()
        layers = list(self._layers.values())
        self._layers, self._tensors = {}, {}
        return layers

    @torch.no_grad()
    def add(self, module: nn.Module, result: TiledAttentionResult, queries: int, keys: int) -> None:
        """Add one call's result."""
        name = self._names[id(module)]
        if name not in self._layers:
            layer_idx = getattr(module, "layer_idx", None)
            tolerance = settings_of(getattr(module, "config", None), layer_idx).tolerance
            self._layers[name] = LayerSums(name, layer_idx, tolerance)
        counts = {"calls": 1.0, "tokens": float(result.output.shape[0] * queries), f"path/{result.path}": 1.0}
        counts["router"] = float((result.reason or "").startswith(router.FASTER))
        counts.update((f"ms/{stage}", milliseconds) for stage, milliseconds in result.stages.items())
        sums = self._layers[name].sums
        for key, count in counts.items():
            sums[key] = [sums.get(key, [0.0])[0] + count]
        self._add_tiles(name, result)
        if result.audit is not None:
            infidelity = result.audit.infidelity.float()
            self._sum(name, "rows", (~infidelity.isnan()).sum((0, 2)))
            self._sum(name, "infidelity", infidelity.nansum((0, 2)))
            self._sum(name, "infidelity_squared", infidelity.square().nansum((0, 2)))

    @torch.no_grad()
    def inspect(self, module: nn.Module, query: Tensor, key: Tensor, mask: AttentionMask, how: dict[str, Any]) -> None:
        """Add the observables of the same call."""
        if not self._observables or how.get("bias") is not None:
            return
        name, rows = self._names[id(module)], random_rows(query.shape[2], _ROWS, 0, query.device)
        wide = torch.promote_types(query.dtype, torch.float32)
        key, scale = key.to(wide), how["scale"]
        _, _, weights = reference_attention(
            query[:, :, rows].to(wide), key, key[..., :1], mask.rows(rows), scale, how.get("softcap"), how.get("sinks")
        )
        if "entropy" in self._observables:
            self._sum(name, "entropy", torch.special.entr(weights).sum(-1).mean((0, 2)))
        if "effective_rank" in self._observables:
            self._sum(name, "effective_rank", head_entropy(weights).exp().mean(0))

    def _add_tiles(self, name: str, result: TiledAttentionResult) -> None:
        tile_map = result.tile_map
        if tile_map is None:
            self._sum(name, "density", torch.ones(result.output.shape[1], device=result.output.device))
            return
        self._sum(name, "density", tile_map.density.mean(0))
        counts = [(tile_map.levels == level).sum() for level in (EXACT, COARSE)]
        self._sum(name, "tiles", torch.stack([*counts, tile_map.allowed().sum()]))

    def _sum(self, name: str, key: str, value: Tensor) -> None:
        value, before = value.float(), self._tensors.get((name, key))
        self._tensors[name, key] = value if before is None else before + value


def merge(processes: Iterable[list[LayerSums]]) -> list[LayerSums]:
    """The sums over all processes."""
    merged: dict[str, LayerSums] = {}
    for layer in (layer for layers in processes for layer in layers):
        total = merged.setdefault(layer.name, LayerSums(layer.name, layer.layer_idx, layer.tolerance))
        for key, values in layer.sums.items():
            before = total.sums.get(key, [0.0] * len(values))
            total.sums[key] = [a + b for a, b in zip(before, values, strict=True)]
    return list(merged.values())


def model_metrics(layers: list[LayerSums]) -> dict[str, float]:
    """What the sums of all layers say, by name; empty without calls."""
    if not layers:
        return {}
    density = torch.tensor([value for layer in layers for value in layer.mean("density")])
    found = {"density": float(density.mean())}
    found.update((f"density_p{p}", float(density.quantile(p / 100))) for p in (10, 90))
    calls = _total(layers, "calls")
    found.update((f"{path}_calls", _total(layers, f"path/{path}") / calls) for path in _PATHS)
    found["router_dense_calls"] = _total(layers, "router") / calls
    if allowed := _total(layers, "tiles", 2):
        exact, coarse = (_total(layers, "tiles", level) / allowed for level in (0, 1))
        found.update(tiles_exact=exact, tiles_coarse=coarse, tiles_culled=1 - exact - coarse)
    found.update(_audited(layers))
    for name in OBSERVABLES:
        values = [value for layer in layers if name in layer.sums for value in layer.mean(name)]
        if values:
            found[name] = sum(values) / len(values)
    stages_seen = sorted({key for layer in layers for key in layer.sums if key.startswith("ms/")})
    for key in stages_seen:  # of one forward pass
        found[f"ms_{key[3:]}"] = sum(layer.mean(key)[0] for layer in layers if key in layer.sums)
    return found


def layer_metrics(layers: list[LayerSums]) -> dict[str, float]:
    """Density and infidelity of each layer, by name."""
    found = {}
    for position, layer in enumerate(layers):
        name = f"layer{position if layer.layer_idx is None else layer.layer_idx}"
        found[f"{name}_density"] = sum(layer.mean("density")) / len(layer.sums["density"])
        if heads := layer.infidelity():
            found[f"{name}_infidelity"] = sum(mean for mean, _ in heads) / len(heads)
    return found


def _audited(layers: list[LayerSums]) -> dict[str, float]:
    heads = [(mean, width, layer.tolerance) for layer in layers for mean, width in layer.infidelity()]
    if not heads:
        return {}
    return {
        "infidelity": sum(mean for mean, _, _ in heads) / len(heads),
        "infidelity_ci": math.sqrt(sum(width * width for _, width, _ in heads)) / len(heads),
        "heads_over_tolerance": sum(mean > tolerance for mean, _, tolerance in heads) / len(heads),
    }


def _total(layers: list[LayerSums], key: str, index: int = 0) -> float:
    return sum(layer.sums[key][index] for layer in layers if key in layer.sums)
