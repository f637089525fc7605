"""Ways to choose the tiles of a whole model, for `aat bench selection`: settings, and trials on whole matrices."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

import aat_hf
from aat_hf.bench._common import mask_and_scale
from aat_hf.bench._order_trial import Grouping, Layout, choose, density, heads_of
from aat_hf.compare import replaced_attention, run_pass
from aat_hf.config import AATConfig
from aat_hf.tiling.masks import AttentionMask


class Outcome(NamedTuple):
    """One tiled pass.

    Attributes:
        hidden: (tokens, hidden), what the language model head is applied to.
        density: kept of the visible tiles, mean over all layers and heads; 1 for those that ran exactly.
        lost: realised infidelity, mean over the tiled layers and their heads: of audited rows, of all rows where
            matrices are whole.
        select_seconds, attention_seconds: all layers together; NaN where matrices are whole.
    """

    hidden: Tensor
    density: float
    lost: float
    select_seconds: float = math.nan
    attention_seconds: float = math.nan


@dataclass(frozen=True)
class Settings:
    """`attn_implementation="aat"` with these settings, every layer as the router decides."""

    name: str
    tolerance: float
    selector: str = "mix"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: Any, input_ids: Tensor) -> Outcome:
        """One pass over a text (1, tokens)."""
        config = AATConfig(selector=self.selector, tolerance=self.tolerance).replace(**self.changes)
        aat_hf.configure(model, **config.to_dict())
        with aat_hf.record(model) as report:
            tiled = run_pass(model, input_ids, "aat")
        select = report.milliseconds.get("select", 0.0) / 1e3
        return Outcome(tiled.hidden, report.density, report.infidelity[0], select, tiled.attention_seconds)

    def compile(self, model: Any, input_ids: Tensor) -> None:
        """A tiled pass over a short text, so that no pass that is timed compiles a loop."""
        config = AATConfig(selector=self.selector, tolerance=0.3).replace(**self.changes)
        aat_hf.configure(model, **config.replace(min_length=0, dense_prefix=0).to_dict())
        with aat_hf.record(model):
            run_pass(model, input_ids, "aat")


@dataclass(frozen=True)
class WholeMatrices:
    """Every head of every layer by its whole attention matrix, keys in tiles of `grouping`; tokens fill query tiles."""

    name: str
    tolerance: float
    estimate: str
    grouping: Grouping

    def run(self, model: Any, input_ids: Tensor) -> Outcome:
        """One pass over a text (1, tokens)."""
        heads: list[tuple[float, float]] = []

        def tiled(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
            output, found = self._attention(query, key, value, *mask_and_scale(query, key, attention_mask, kwargs))
            heads.extend(found)
            return output, None

        with replaced_attention("sdpa", lambda _: tiled):
            hidden = run_pass(model, input_ids, "sdpa").hidden
        return Outcome(hidden, *map(fmean, zip(*heads, strict=True)))

    def compile(self, model: Any, input_ids: Tensor) -> None:
        """Nothing is timed."""

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float
    ) -> tuple[Tensor, list[tuple[float, float]]]:
        """Output (1, queries, heads, value_dim), and density and infidelity of each head."""
        layout = Layout.of(self.grouping, mask, AATConfig(tolerance=self.tolerance))
        outputs, found = [], []
        for head in heads_of(q, k, v, mask, scale, [self.grouping]):
            masses = head.masses(layout)
            kept = choose(layout, head.estimate(layout, masses, self.estimate), head.estimate(layout, masses, "oracle"))
            lost = masses.masked_fill(layout.rows(kept, head.every), 0.0).sum(-1).mean()
            found.append((float(density(layout, kept)), float(lost)))
            outputs.append(head.output(layout, kept, head.every))
        return torch.stack(outputs, 1)[None], found


Method = Settings | WholeMatrices

_CHANGES: dict[str, dict[str, Any]] = {
    "one pass": {"control_rows": 0},
    "every 8th row measured": {"sample_stride": 8},
    "every 32nd row measured": {"sample_stride": 32},
    "every 2nd row predicted": {"predict_stride": 2},
    "every 8th row predicted": {"predict_stride": 8},
    "tiles of 32": {"key_tile": 32},
    "tiles of 64": {"key_tile": 64},
    "centroids": {"coarse": True},
}
_GROUPINGS = {
    "mix": ("16", "64", "16/512", "16/1024", "16/2048", "64/1024", "16/1024/coordinate"),
    "oracle": ("16", "16/1024"),
}


def ablations(tolerance: float) -> list[Method]:
    """`mix` with one setting changed: the second pass, sources of rows, tiles, centroids."""
    return [Settings(f"mix, {name}", tolerance, "mix", changes) for name, changes in _CHANGES.items()]


def orders(tolerance: float) -> list[Method]:
    """Key orders: axis, chunk and leaf of the tree."""
    return [
        whole(estimate, Grouping.parse(grouping), tolerance) for estimate, of in _GROUPINGS.items() for grouping in of
    ]


def whole(estimate: str, grouping: Grouping, tolerance: float) -> WholeMatrices:
    """With the name that tables show."""
    return WholeMatrices(f"{estimate}, {grouping.name}", tolerance, estimate, grouping)
