"""One head under several groupings of its keys, from its whole attention matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.tiling.layout import forced_tiles, sampled_rows
from aat_hf.tiling.masks import NONE, AttentionMask
from aat_hf.tiling.measure import scores_by_tile
from aat_hf.tiling.moments import log_mass, summarise
from aat_hf.tiling.order import AXES, closed_tiles, content_order
from aat_hf.tiling.select import select_tiles
from aat_hf.tiling.selectors import blend

LEAF = 16
ESTIMATES = ("oracle", "moments", "mix")
_PASSES = 3  # as of `aat_hf.tiling.repair`

Tree = tuple[int, str]
"""Chunk and axis of a content order."""


@dataclass(frozen=True)
class Grouping:
    """Keys in tiles of `key_tile`: runs of the text, or, with a `chunk`, of the content order inside closed chunks."""

    key_tile: int
    chunk: int | None = None
    axis: str = "principal"

    @classmethod
    def parse(cls, text: str) -> Grouping:
        """Of "TILE", "TILE/CHUNK" or "TILE/CHUNK/AXIS".

        Raises:
            ValueError: not such numbers, TILE no leaf * 2^m, CHUNK no TILE * 2^m, or AXIS unknown.
        """
        parts = text.split("/")
        grouping = cls(int(parts[0]), int(parts[1]) if len(parts) > 1 else None, *parts[2:3])
        steps = [grouping.key_tile / LEAF, (grouping.chunk or grouping.key_tile) / max(1, grouping.key_tile)]
        if len(parts) > 3 or grouping.axis not in AXES or not all(step in (2**m for m in range(20)) for step in steps):
            raise ValueError(
                f"{text!r}: must be TILE, TILE/CHUNK or TILE/CHUNK/AXIS, TILE and CHUNK {LEAF} times powers of two, "
                f"AXIS one of {', '.join(AXES)}"
            )
        return grouping

    @property
    def name(self) -> str:
        """For tables."""
        if self.chunk is None:
            return f"{self.key_tile} in place"
        along = "" if self.axis == "principal" else f", by {self.axis}"
        return f"{self.key_tile} by content in {self.chunk}{along}"

    @property
    def tree(self) -> Tree | None:
        """What the order of the keys follows; None in place."""
        return None if self.chunk is None else (self.chunk, self.axis)


@dataclass(frozen=True)
class Layout:
    """The grid of a grouping, shared by the heads of a call: each (1, 1, query_tiles, key_tiles).

    closed: tiles that hold keys in content order.
    """

    grouping: Grouping
    config: AATConfig
    states: Tensor
    forced: Tensor
    closed: Tensor

    @classmethod
    def of(cls, grouping: Grouping, mask: AttentionMask, config: AATConfig) -> Layout:
        """The grid under `mask`; the first chunk begins behind the sink keys."""
        config = config.replace(key_tile=grouping.key_tile)
        states = mask.tile_states(config.query_tile, config.key_tile)
        forced = forced_tiles(mask, states, config)
        if grouping.chunk is None:
            closed = torch.zeros_like(forced)
        else:
            closed = closed_tiles(states, forced, config.key_tile, grouping.chunk, config.sink_keys)
        return cls(grouping, config, states, forced, closed)

    def rows(self, of_tiles: Tensor, rows: Tensor) -> Tensor:
        """Rows (R, key_tiles) of a grid."""
        return of_tiles[0, 0, rows // self.config.query_tile]


class Head:
    """The attention of one head, whole.

    Args:
        q, k, v: (1, 1, N, dim), N a multiple of the query tile.
        mask: of one batch row and one rule for all heads.
        orders: (N,) content order of each tree.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, orders: Mapping[Tree, Tensor]
    ) -> None:
        self.q, self.k, self.v, self.scale, self.orders = q, k, v, scale, orders
        self.every = torch.arange(q.shape[2], device=q.device)
        scores = scores_by_tile(q, k, mask, self.every, LEAF, scale, None)[0, 0].flatten(1)
        self.lse = scores.logsumexp(-1)
        self.weights = scores.sub_(self.lse[:, None]).exp_()  # [N, N]
        by_key = self.weights.T.contiguous()  # whole rows are gathered faster than columns
        self._leaves = {tree: by_key[order].unflatten(0, (-1, LEAF)).sum(1).T for tree, order in orders.items()}
        self._in_place = self.weights.unflatten(1, (-1, LEAF)).sum(-1)

    def masses(self, layout: Layout) -> Tensor:
        """Exact tile masses of all rows: (N, key_tiles)."""
        masses = self._in_place
        if layout.grouping.tree is not None:
            closed = layout.rows(layout.closed, self.every).repeat_interleave(layout.config.key_tile // LEAF, 1)
            masses = torch.where(closed, self._leaves[layout.grouping.tree], masses)
        return masses.unflatten(1, (-1, layout.config.key_tile // LEAF)).sum(-1)

    def estimate(self, layout: Layout, masses: Tensor, name: str) -> Tensor:
        """Mean masses of each query tile, exact ("oracle") or estimated: (1, 1, query_tiles, key_tiles)."""
        if name == "oracle":
            return _mean(masses, layout)
        predicted = _mean(self._predicted(layout, masses), layout)
        if name == "moments":
            return predicted
        measured = _mean(masses[self._sampled(layout, layout.config.sample_stride)], layout)
        return blend(measured, predicted, layout.states)

    def output(self, layout: Layout, kept: Tensor, rows: Tensor) -> Tensor:
        """Attention of `rows` (R,) to the `kept` tiles alone, renormalised: (R, value_dim)."""
        tile = layout.config.key_tile
        keys = layout.rows(kept & ~layout.closed, rows).repeat_interleave(tile, 1)
        if layout.grouping.tree is not None:
            order = self.orders[layout.grouping.tree]
            keys[:, order] |= layout.rows(kept & layout.closed, rows).repeat_interleave(tile, 1)
        weights = self.weights[rows] * keys
        return (weights @ self.v[0, 0]) / weights.sum(-1, keepdim=True)

    def _sampled(self, layout: Layout, stride: int) -> Tensor:
        return sampled_rows(len(self.every), layout.config.query_tile, stride, self.q.device).flatten()

    def _predicted(self, layout: Layout, masses: Tensor) -> Tensor:
        """Predicted masses of every `predict_stride`-th row, exact where tiles are forced: (R, key_tiles)."""
        rows = self._sampled(layout, layout.config.predict_stride)
        far = self._log_mass(layout, rows, self.k)
        if layout.grouping.tree is not None:
            reordered = self.k[:, :, self.orders[layout.grouping.tree]]
            far = torch.where(layout.rows(layout.closed, rows), self._log_mass(layout, rows, reordered), far)
        exact = masses[rows].log() + self.lse[rows, None]
        log_masses = torch.where(layout.rows(layout.forced, rows), exact, far)
        return log_masses.masked_fill(layout.rows(layout.states, rows) == NONE, -torch.inf).softmax(-1)

    def _log_mass(self, layout: Layout, rows: Tensor, keys: Tensor) -> Tensor:
        moments = summarise(keys, layout.config.key_tile, layout.config.summaries)
        return log_mass(self.q[:, :, rows], moments, self.scale)[0, 0]


def heads_of(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, groupings: Sequence[Grouping]
) -> Iterator[Head]:
    """The heads of a call of batch 1, one by one, with the content orders that the groupings need."""
    trees = {grouping.tree for grouping in groupings if grouping.tree is not None}
    orders = {(chunk, axis): content_order(k, chunk, LEAF, AATConfig().sink_keys, axis)[0] for chunk, axis in trees}
    for head in range(q.shape[1]):
        kv = head // (q.shape[1] // k.shape[1])
        own = {tree: order[kv] for tree, order in orders.items()}
        yield Head(q[:, head, None], k[:, kv, None], v[:, kv, None], mask, scale, own)


def density(layout: Layout, kept: Tensor) -> Tensor:
    """Kept of the visible tiles: a scalar."""
    return kept.sum() / (layout.states != NONE).sum()


def choose(layout: Layout, estimate: Tensor, exact: Tensor) -> Tensor:
    """Tiles kept: bool (1, 1, query_tiles, key_tiles).

    A head that loses more than the tolerance is chosen again, tighter, as by `aat_hf.tiling.repair`, but from the loss
    of all rows in place of control rows, so that no chance is in it.

    Args:
        estimate, exact: (1, 1, query_tiles, key_tiles) mean masses.
    """
    tolerance = torch.full((1, 1), layout.config.tolerance)
    for _ in range(_PASSES):
        kept = select_tiles(estimate, layout.forced, layout.states, tolerance, layout.config.max_kept)
        lost = exact.masked_fill(kept, 0.0).sum(-1).mean()
        if lost <= layout.config.tolerance:
            break
        tolerance = tolerance * layout.config.tolerance / lost
    return kept


def _mean(masses: Tensor, layout: Layout) -> Tensor:
    """Mean over the rows of each query tile: (1, 1, query_tiles, key_tiles)."""
    return masses.unflatten(0, (layout.states.shape[2], -1)).mean(1)[None, None]
