"""`record(model)`: what every attention layer did: path, density, audited infidelity, time."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from aat_hf.kernels.dense import Extras, dense_attention
from aat_hf.patterns import KeptCells, MassCells, Patterns, classify, kept_cells
from aat_hf.report import metrics, stages
from aat_hf.tiling.audit import half_width
from aat_hf.tiling.tile_map import TileMap

if TYPE_CHECKING:
    from aat_hf.attention import TiledAttentionResult
    from aat_hf.tiling.masks import AttentionMask

_active: list[Report] = []
_listeners: WeakSet[Recorder] = WeakSet()
_MOST_WEIGHTS = 1 << 28  # attention weights of one call that observables may form (1 GiB)


class Recorder(Protocol):
    """What is told of every attention call of the modules it watches."""

    def watches(self, module: nn.Module) -> bool:
        """Whether calls of `module` are to be audited and handed to `add` and `inspect`."""

    def add(self, module: nn.Module, result: TiledAttentionResult, queries: int, keys: int) -> None:
        """Take one call's result."""

    def inspect(self, module: nn.Module, query: Tensor, key: Tensor, mask: AttentionMask, how: dict[str, Any]) -> None:
        """Look at the same call's inputs; `how` are the further arguments of `tiled_attention`."""


@dataclass
class LayerRecord:
    """All calls of one layer that took the same path for the same reason; those of single queries apart.

    Attributes:
        name: module name; layer_idx: its index in the model, if it has one.
        path: "tiled", "skip" or "dense"; reason: why not tiled.
        calls: number of calls; pairs: query-key pairs (rows times keys) of all calls, the weight in averages.
        density: (heads,) fraction of allowed tiles computed exactly, averaged over calls and batch; 1 when dense.
        estimated: (heads,) infidelity the selector expected, averaged likewise.
        infidelity: audited rows of all calls, (heads, rows); None when nothing was audited.
        tile_map: of the last call, when maps are kept.
        cells: what `patterns` needs of the last call: the selector's masses, of "skip" mode the tile map; None when
            nothing was tiled.
        milliseconds: by stage, all calls.
        observables: those asked for, of the last call, (heads,) or (heads, ...), mean over the batch.
    """

    name: str
    layer_idx: int | None
    path: str
    reason: str | None
    calls: int = 0
    pairs: int = 0
    density: Tensor = field(default_factory=lambda: torch.zeros(()))
    estimated: Tensor = field(default_factory=lambda: torch.zeros(()))
    infidelity: Tensor | None = None
    tile_map: TileMap | None = None
    cells: KeptCells | MassCells | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    observables: dict[str, Tensor] = field(default_factory=dict)
    _patterns: Patterns | None = field(default=None, init=False, repr=False)

    @property
    def patterns(self) -> Patterns | None:
        """Pattern of each head in the last tiled call (`aat_hf.patterns`), found when first asked for."""
        if self._patterns is None and self.cells is not None:
            self._patterns = classify(self.cells)
        return self._patterns

    @property
    def infidelity_mean(self) -> Tensor | None:
        """Mean audited infidelity: (heads,)."""
        return None if self.infidelity is None else self.infidelity.nanmean(-1)

    @property
    def infidelity_half_width(self) -> Tensor | None:
        """Half width of the 95 % confidence interval of `infidelity_mean`: (heads,)."""
        return None if self.infidelity is None else half_width(self.infidelity)

    def update(self, result: TiledAttentionResult, pairs: int, keep_map: bool) -> None:
        """Add one call's result."""
        heads = result.output.shape[1]
        density = torch.ones(heads) if result.tile_map is None else result.tile_map.density.mean(0).float().cpu()
        estimated = torch.zeros(heads) if result.estimated is None else result.estimated.mean(0).float().cpu()
        share = pairs / (self.pairs + pairs)
        self.density = self.density + (density - self.density) * share
        self.estimated = self.estimated + (estimated - self.estimated) * share
        self.calls, self.pairs = self.calls + 1, self.pairs + pairs
        for stage, milliseconds in result.stages.items():
            self.milliseconds[stage] = self.milliseconds.get(stage, 0.0) + milliseconds
        if result.audit is not None:
            rows = result.audit.infidelity.float().cpu().transpose(0, 1).flatten(1)
            self.infidelity = rows if self.infidelity is None else torch.cat([self.infidelity, rows], -1)
        if result.tile_map is not None:
            self.cells, self._patterns = result.cells or kept_cells(result.tile_map), None
        if keep_map:
            self.tile_map = result.tile_map

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, one number per head where it varies."""
        mean, width = self.infidelity_mean, self.infidelity_half_width
        return {
            "name": self.name,
            "layer_idx": self.layer_idx,
            "path": self.path,
            "reason": self.reason,
            "calls": self.calls,
            "pairs": self.pairs,
            "density": _numbers(self.density),
            "estimated_infidelity": _numbers(self.estimated),
            "infidelity": None if mean is None else _numbers(mean),
            "infidelity_half_width": None if width is None else _numbers(width),
            "patterns": None if self.patterns is None else self.patterns.names[0],
            "observables": {name: value.tolist() for name, value in self.observables.items()},
            "milliseconds": dict(self.milliseconds),
        }


class Report:
    """Records of all attention layers of a model; see `record`."""

    def __init__(self, model: nn.Module, keep_maps: bool = False, observables: Iterable[str] = ()) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._records: dict[tuple[str, str, str | None, bool], LayerRecord] = {}
        self.keep_maps = keep_maps
        self._observables = metrics.check_names(observables)
        self._latest: tuple[LayerRecord, TileMap | None] | None = None

    def watches(self, module: nn.Module) -> bool:
        """Whether `module` belongs to the recorded model."""
        return id(module) in self._names

    def add(self, module: nn.Module, result: TiledAttentionResult, queries: int, keys: int) -> None:
        """Record one call of `module`."""
        key = (self._names[id(module)], result.path, result.reason, queries == 1)
        if key not in self._records:
            self._records[key] = LayerRecord(key[0], getattr(module, "layer_idx", None), result.path, result.reason)
        self._records[key].update(result, queries * keys, self.keep_maps)
        self._latest = (self._records[key], result.tile_map)

    def inspect(self, module: nn.Module, query: Tensor, key: Tensor, mask: AttentionMask, how: dict[str, Any]) -> None:
        """Observables of the call just added, from its exact attention weights; calls with a past are left out."""
        size = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
        if not self._observables or self._latest is None or query.shape[2] != key.shape[2]:
            return
        if size > _MOST_WEIGHTS:
            raise ValueError(
                f"observables need the attention weights, {size} numbers in {self._latest[0].name}; "
                f"at most {_MOST_WEIGHTS} are formed: record a shorter text for them"
            )
        extras = Extras(how.get("softcap"), how.get("sinks"), how.get("bias"))
        with torch.no_grad():
            exact = dense_attention(query, key, key[..., :1], mask, how["scale"], extras, need_weights=True)
        record, tile_map = self._latest
        assert exact.weights is not None  # asked for
        wanted = [o for o in self._observables if tile_map is not None or not metrics.OBSERVABLES[o].needs_map]
        found = metrics.observables(exact.weights, wanted, tile_map=tile_map)
        record.observables = {name: value.mean(0).float().cpu() for name, value in found.items()}

    @property
    def layers(self) -> list[LayerRecord]:
        """One record per layer, path and reason, in the order of first calls."""
        return list(self._records.values())

    @property
    def density(self) -> float:
        """Fraction of the allowed tiles computed exactly, over all layers and heads; NaN without calls."""
        return _weighted([(float(r.density.mean()), r.pairs) for r in self.layers])

    @property
    def infidelity(self) -> tuple[float, float]:
        """Mean audited infidelity of the tiled calls and the half width of its 95 % interval; NaN if not audited."""
        means, widths = [], []
        for record in self.layers:
            if record.infidelity_mean is not None and record.infidelity_half_width is not None:
                means.append(record.infidelity_mean)
                widths.append(record.infidelity_half_width)
        if not means:
            return math.nan, math.nan
        mean, width = torch.cat(means), torch.cat(widths)
        return float(mean.nanmean()), float(width.square().nansum().sqrt() / len(width))

    @property
    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by stage, all layers."""
        total: dict[str, float] = {}
        for record in self.layers:
            for stage, milliseconds in record.milliseconds.items():
                total[stage] = total.get(stage, 0.0) + milliseconds
        return total

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        mean, width = self.infidelity
        return {
            "density": self.density,
            "infidelity": mean,
            "infidelity_half_width": width,
            "milliseconds": self.milliseconds,
            "layers": [record.to_dict() for record in self.layers],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON; NaN becomes null."""
        return json.dumps(_without_nan(self.to_dict()), indent=1)

    def __str__(self) -> str:
        lines = [
            f"{'layer':<40} {'path':<6} {'calls':>5} {'density':>8} {'infidelity':>18} {'ms':>9}  patterns, reason"
        ]
        for r in self.layers:
            loss = "not audited"
            if r.infidelity_mean is not None and r.infidelity_half_width is not None:
                spread = r.infidelity_half_width.square().nansum().sqrt() / len(r.infidelity_mean)
                loss = f"{r.infidelity_mean.nanmean():.4f} ± {spread:.4f}"
            elif r.path == "dense":
                loss = "0 (exact)"
            total = sum(r.milliseconds.values())
            lines.append(
                f"{r.name[-40:]:<40} {r.path:<6} {r.calls:>5} {r.density.mean():>8.3f} {loss:>18} {total:>9.1f}"
                f"  {_summary(r.patterns) or r.reason or ''}".rstrip()
            )
        mean, width = self.infidelity
        times = ", ".join(f"{stage} {ms:.0f} ms" for stage, ms in self.milliseconds.items())
        lines.append(f"density {self.density:.3f}, audited infidelity {mean:.4f} ± {width:.4f}; {times}")
        return "\n".join(lines)


@contextmanager
def record(model: nn.Module, keep_maps: bool = False, observables: Iterable[str] = ()) -> Iterator[Report]:
    """Record what the attention layers of `model` do inside the block.

    Every tiled call is audited: `audit_rows` random rows are compared with exact attention.

    Args:
        model: a model whose attention implementation is "aat".
        keep_maps: keep the tile map of each layer's last call (memory: one byte per tile pair and more).
        observables: names of `aat_hf.report.metrics` to compute for every prefill call, from its full attention
            weights: for short texts.

    Raises:
        ValueError: an unknown observable. In the block: a text too long for observables.
    """
    report = Report(model, keep_maps, observables)
    _active.append(report)
    before, stages.timing = stages.timing, True
    try:
        yield report
    finally:
        _active.remove(report)
        stages.timing = before


def listen(recorder: Recorder) -> None:
    """Tell `recorder` of the calls it watches, as long as somebody keeps it alive."""
    _listeners.add(recorder)


def recorders_of(module: nn.Module) -> list[Recorder]:
    """The reports and further recorders that are listening to `module`."""
    there = (*_active, *_listeners) if _active or len(_listeners) else ()  # walking weak references takes microseconds
    return [recorder for recorder in there if recorder.watches(module)]


def _summary(patterns: Patterns | None) -> str:
    """How many heads have which pattern, the most frequent first."""
    counts = Counter(patterns.names[0]) if patterns is not None else Counter()
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.flatten()]


def _weighted(values: list[tuple[float, int]]) -> float:
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else math.nan


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
