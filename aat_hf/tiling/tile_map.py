"""`TileMap`: which (query tile, key tile) pairs are computed, and at which level of detail, in compressed rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aat_hf.tiling.masks import FULL, NONE, PARTIAL, AttentionMask

CULLED, COARSE, EXACT = 0, 1, 2


@dataclass(frozen=True)
class TileMap:
    """Levels of detail of a (batch, heads, query_tiles, key_tiles) grid as compressed sparse rows.

    Row r = (b * heads + h) * query_tiles + i holds the tiles `columns[row_start[r] : row_start[r + 1]]`, sorted by
    key tile; a tile that is in no row is culled.

    Attributes:
        row_start: (batch * heads * query_tiles + 1,) int64.
        columns: (tiles,) int64, key tile.
        levels: (tiles,) uint8, `EXACT` (every key) or `COARSE` (one centroid).
        cut: (tiles,) bool, the mask cuts this tile: positions must be checked inside it.
        states: (batch or 1, heads or 1, query_tiles, key_tiles) uint8, how the mask meets each pair.
        shape: (batch, heads, query_tiles, key_tiles).
        query_tile, key_tile: rows and keys of a tile; the last of each may be shorter.
    """

    row_start: Tensor
    columns: Tensor
    levels: Tensor
    cut: Tensor
    states: Tensor
    shape: tuple[int, int, int, int]
    query_tile: int
    key_tile: int

    @classmethod
    def from_dense(cls, levels: Tensor, states: Tensor, query_tile: int, key_tile: int) -> TileMap:
        """Compress `levels` (batch, heads, query_tiles, key_tiles) uint8; pairs the mask forbids are culled."""
        batch, heads, query_tiles, key_tiles = levels.shape
        if levels.device.type == "cpu":
            from aat_hf.kernels.cpu_compress import compressed  # numba, loaded when needed

            parts = compressed(levels, states)
        else:
            parts = _compressed(levels, states)
        return cls(*parts, states, (batch, heads, query_tiles, key_tiles), query_tile, key_tile)

    @classmethod
    def dense(cls, mask: AttentionMask, batch: int, heads: int, query_tile: int, key_tile: int) -> TileMap:
        """Every allowed tile exact."""
        states = mask.tile_states(query_tile, key_tile)
        levels = torch.full((batch, heads, *states.shape[2:]), EXACT, dtype=torch.uint8, device=states.device)
        return cls.from_dense(levels, states, query_tile, key_tile)

    @property
    def rows(self) -> Tensor:
        """Row of every stored tile: (tiles,) int64."""
        count = self.row_start.diff()
        return torch.repeat_interleave(torch.arange(len(count), device=count.device), count)

    def to_dense(self) -> Tensor:
        """Levels as (batch, heads, query_tiles, key_tiles) uint8: 0 culled, 1 coarse, 2 exact."""
        dense = torch.zeros(self.shape, dtype=torch.uint8, device=self.columns.device)
        dense.view(-1, self.shape[3])[self.rows, self.columns] = self.levels
        return dense

    def allowed(self) -> Tensor:
        """Pairs the mask admits, wholly or in part: bool (batch, heads, query_tiles, key_tiles)."""
        return (self.states != NONE).expand(self.shape)

    @property
    def exact(self) -> Tensor:
        """Pairs computed exactly: bool (batch, heads, query_tiles, key_tiles)."""
        return self.to_dense() == EXACT

    @property
    def density(self) -> Tensor:
        """Exact tiles / allowed tiles: float32 (batch, heads); 1 where the mask allows nothing."""
        before = torch.nn.functional.pad((self.levels == EXACT).cumsum(0), (1, 0))  # exact tiles before each
        kept = before[self.row_start[:: self.shape[2]]].diff().view(self.shape[:2])
        allowed = (self.states != NONE).sum((-1, -2)).expand(self.shape[:2])
        return torch.where(allowed > 0, kept / allowed.clamp(min=1), torch.ones((), device=kept.device))

    def to_block_mask(self, mask: AttentionMask) -> Any:
        """The exact tiles as a `torch.nn.attention.flex_attention.BlockMask`; `mask` decides inside cut tiles."""
        from torch.nn.attention.flex_attention import BlockMask

        exact = self.exact
        full = exact & (self.states == FULL)
        partial_count, partial_index = _ordered(exact & ~full)
        full_count, full_index = _ordered(full)

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            inside = (q < mask.queries) & (k < mask.keys)
            return inside & mask.allowed(b, h, q.clamp(max=mask.queries - 1), k.clamp(max=mask.keys - 1))

        return BlockMask.from_kv_blocks(
            partial_count,
            partial_index,
            full_count,
            full_index,
            BLOCK_SIZE=(self.query_tile, self.key_tile),
            mask_mod=mask_mod,
            seq_lengths=(mask.queries, mask.keys),
        )


def _compressed(levels: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row_start`, `columns`, `levels` and `cut` in PyTorch, on any device."""
    batch, heads, query_tiles, key_tiles = levels.shape
    place = ((levels != CULLED) & (states != NONE)).flatten().nonzero()[:, 0]
    first = torch.arange(batch * heads * query_tiles + 1, device=place.device) * key_tiles
    row_start = torch.searchsorted(place, first)  # a sum of bools would make them int64 first
    cut = (states == PARTIAL).expand(levels.shape).flatten()[place]
    return row_start, place % key_tiles, levels.flatten()[place], cut


def _ordered(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (…, query_tiles) and key tile indices (…, query_tiles, key_tiles), the kept ones first, as int32."""
    order = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return kept.sum(-1).to(torch.int32), order.to(torch.int32)
