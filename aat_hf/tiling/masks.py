"""Attention masks without the N x N tensor.

A mask answers three questions: may query q see key k (`allowed`), the same for whole rows (`rows`), and how the mask
meets each (query tile, key tile) pair (`tile_states`: NONE, PARTIAL, FULL). `IntervalMask` covers every ordinary
mask (causal, bidirectional, window, chunked, packed, padded) in O(N) memory: row i sees the keys
first[i] <= j < last[i] that are valid. `FunctionMask` evaluates any predicate of indices, `TensorMask` wraps a
4-D boolean tensor that the caller already has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

NONE, PARTIAL, FULL = 0, 1, 2
_T = TypeVar("_T")
_CHUNK_ELEMENTS = 1 << 24  # elements of a mask evaluated at a time (16 MiB of booleans)


class AttentionMask(ABC):
    """What a query may attend to; indices are local to the call: 0 <= q < queries, 0 <= k < keys.

    A mask says the same for as long as it lives, so that what was found out about it is kept (`known`).
    """

    def __init__(self, batch: int, queries: int, keys: int, device: torch.device, heads: int = 1) -> None:
        self.batch, self.heads, self.queries, self.keys, self.device = batch, heads, queries, keys, device
        self._known: dict[Hashable, Any] = {}

    def known(self, name: Hashable, find: Callable[[], _T]) -> _T:
        """What `find` says of this mask, asked once and kept under `name` for the next layer."""
        if name not in self._known:
            with torch.inference_mode(False):  # a later backward pass may save it
                self._known[name] = find()
        return cast("_T", self._known[name])

    @abstractmethod
    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Boolean tensor of the broadcast shape of the four index tensors."""

    def alike(self, b: Tensor, q: Tensor, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Which of some blocks of pairs have the same mask inside; a rule of single heads or unknown: none.

        Args:
            b: (blocks,) int64, batch row; q: (blocks, rows) int64, queries.
            start: (blocks,) int64, first of its `width` keys; those beyond the last key do not count.

        Returns:
            one block of each kind (kinds,) and the kind of each block (blocks,), int64.
        """
        every = torch.arange(len(b), device=b.device)
        return every, every

    def rows(self, rows: Tensor) -> Tensor:
        """The mask of the query `rows` (R,) against all keys: bool (batch or 1, heads or 1, R, keys)."""
        b = torch.arange(self.batch, device=self.device)[:, None, None, None]
        h = torch.arange(self.heads, device=self.device)[None, :, None, None]
        k = torch.arange(self.keys, device=self.device)[None, None, None, :]
        shape = (self.batch, self.heads, len(rows), self.keys)
        return self.allowed(b, h, rows[None, None, :, None], k).expand(shape)

    def key_range(self, rows: Tensor) -> tuple[int, int]:
        """Bounds (low, high) such that `rows` see no key outside low <= k < high."""
        return 0, self.keys

    def positions(self) -> Tensor:
        """Key position each query stands at, for the local band: int64 (batch or 1, queries)."""
        ramp = torch.arange(self.queries, device=self.device)[None] + (self.keys - self.queries)
        return ramp.clamp(min=0)

    def row_chunks(self) -> list[Tensor]:
        """All query rows in pieces whose `rows` mask stays below a fixed number of elements."""
        step = max(1, _CHUNK_ELEMENTS // max(1, self.batch * self.heads * self.keys))
        return list(torch.arange(self.queries, device=self.device).split(step))

    def counts(self, rows: Tensor, key_tile: int) -> Tensor:
        """Allowed keys of each key tile for each of `rows` (R,): int64 (batch or 1, heads or 1, R, key_tiles)."""
        step = max(1, _CHUNK_ELEMENTS // max(1, self.batch * self.heads * self.keys))
        pieces = [_sum_tiles(self.rows(part), key_tile) for part in rows.split(step)]
        return torch.cat(pieces, -2)

    def row_has_keys(self) -> Tensor:
        """Rows that may see at least one key: bool (batch or 1, heads or 1, queries)."""
        return torch.cat([self.rows(part).any(-1) for part in self.row_chunks()], -1)

    def tile_states(self, query_tile: int, key_tile: int) -> Tensor:
        """NONE, PARTIAL or FULL for every tile pair: uint8 (batch or 1, heads or 1, query_tiles, key_tiles).

        The last tiles may be ragged; FULL means every existing pair in the tile is allowed. Found once.
        """
        return self.known(("states", query_tile, key_tile), lambda: self._tile_states(query_tile, key_tile))

    def _tile_states(self, query_tile: int, key_tile: int) -> Tensor:
        """`tile_states` of any mask, from its rows."""
        step = max(1, _CHUNK_ELEMENTS // max(1, self.batch * self.heads * self.keys * query_tile))
        all_rows = torch.arange(self.queries, device=self.device)
        sizes = (self.keys - torch.arange(0, self.keys, key_tile, device=self.device)).clamp(max=key_tile)
        states = []
        for part in all_rows.split(step * query_tile):
            counts = _sum_tiles(self.rows(part), key_tile)  # [B, H, rows, nk]
            per_tile = [c.sum(-2) for c in counts.split(query_tile, -2)]
            full = [c.shape[-2] * sizes for c in counts.split(query_tile, -2)]
            count, total = torch.stack(per_tile, -2), torch.stack(full)
            state = (count > 0).to(torch.uint8) + (count == total).to(torch.uint8)
            states.append(torch.where(count > 0, state, torch.zeros_like(state)))
        return torch.cat(states, -2)


class IntervalMask(AttentionMask):
    """Row i sees the valid keys j with first[i] <= j < last[i].

    Args:
        first: (batch or 1, queries) int64, first visible key.
        last: (batch or 1, queries) int64, one past the last visible key.
        keys: number of keys.
        key_valid: (batch, keys) bool or None; False marks padding.
    """

    def __init__(self, first: Tensor, last: Tensor, keys: int, key_valid: Tensor | None = None) -> None:
        batch = max(first.shape[0], last.shape[0], 1 if key_valid is None else key_valid.shape[0])
        super().__init__(batch, first.shape[1], keys, first.device)
        self.first = first.clamp(0, keys)
        self.last = torch.maximum(last.clamp(0, keys), self.first)
        self.key_valid = key_valid

    @cached_property
    def kind(self) -> str | None:
        """Which mask SDPA needs no tensor for: "full", "causal" (square), else None; found once for all layers."""
        if bool((self.first > 0).any()) or not (self.key_valid is None or bool(self.key_valid.all())):
            return None
        if bool((self.last == self.keys).all()):
            return "full"
        ramp = torch.arange(self.queries, device=self.device) + 1
        return "causal" if self.queries == self.keys and bool((self.last == ramp).all()) else None

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """See `AttentionMask.allowed`."""
        row = _batch_index(b, self.first)
        first, last = self.first[row, q], self.last[_batch_index(b, self.last), q]
        inside = (k >= first) & (k < last)
        return inside if self.key_valid is None else inside & self.key_valid[_batch_index(b, self.key_valid), k]

    def alike(self, b: Tensor, q: Tensor, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """See `AttentionMask.alike`: blocks whose rows see the same keys, counted from their first one."""
        b, place = b[:, None], start[:, None]
        first, last = self.first[_batch_index(b, self.first), q], self.last[_batch_index(b, self.last), q]
        parts = [(edge - place).clamp(0, width) for edge in (first, last)]
        if self.key_valid is not None:
            key = (place + torch.arange(width, device=place.device)).clamp(max=self.keys - 1)
            parts.append(self.key_valid[_batch_index(b, self.key_valid), key])
        return _distinct(torch.cat([part.to(torch.int16) for part in parts], 1))

    def key_range(self, rows: Tensor) -> tuple[int, int]:
        """See `AttentionMask.key_range`."""
        return int(self.first[:, rows].min()), int(self.last[:, rows].max())

    def positions(self) -> Tensor:
        """See `AttentionMask.positions`: never beyond the last visible key."""
        return torch.minimum(super().positions(), (self.last - 1).clamp(min=0))

    def _valid_before(self) -> Tensor:
        """Number of valid keys before each position: (batch, keys + 1)."""
        assert self.key_valid is not None
        return torch.nn.functional.pad(self.key_valid.long().cumsum(-1), (1, 0))

    def counts(self, rows: Tensor, key_tile: int) -> Tensor:
        """See `AttentionMask.counts`; closed form, O(rows * key_tiles)."""
        start = torch.arange(0, self.keys, key_tile, device=self.device)
        end = (start + key_tile).clamp(max=self.keys)
        low = torch.maximum(self.first[:, rows, None], start)  # [B, R, nk]
        high = torch.minimum(self.last[:, rows, None], end)
        high = torch.maximum(high, low)
        if self.key_valid is None:
            return (high - low)[:, None]
        return self._valid_between(low, high)[:, None]

    def _valid_between(self, low: Tensor, high: Tensor) -> Tensor:
        before = self._valid_before()
        shape = (before.shape[0], *low.shape[1:])
        low, high = low.expand(shape), high.expand(shape)
        flat = (before.shape[0], -1)
        count = before.gather(1, high.reshape(flat)) - before.gather(1, low.reshape(flat))
        return count.view(shape)

    def row_has_keys(self) -> Tensor:
        """See `AttentionMask.row_has_keys`."""
        if self.key_valid is None:
            return (self.last > self.first)[:, None]
        return (self._valid_between(self.first, self.last) > 0)[:, None]

    def _tile_states(self, query_tile: int, key_tile: int) -> Tensor:
        """See `AttentionMask.tile_states`; closed form, O(query_tiles * key_tiles).

        A tile between the intervals of two rows (seen by neither) may be called PARTIAL: still correct, never wrong.
        """
        empty = self.last <= self.first
        far = self.keys + 1
        first_low = _per_tile(torch.where(empty, far, self.first), query_tile, torch.amin, far)[..., None]
        first_high = _per_tile(torch.where(empty, far, self.first), query_tile, torch.amax, 0)[..., None]
        last_low = _per_tile(self.last, query_tile, torch.amin, far)[..., None]
        last_high = _per_tile(torch.where(empty, 0, self.last), query_tile, torch.amax, 0)[..., None]
        start = torch.arange(0, self.keys, key_tile, device=self.device)
        end = (start + key_tile).clamp(max=self.keys)
        touched = (first_low < end) & (last_high > start)  # [B, nq, nk]
        full = (first_high <= start) & (last_low >= end)
        if self.key_valid is not None:
            before = self._valid_before()
            valid = (before[:, end] - before[:, start])[:, None]  # [B, 1, nk]
            touched, full = touched & (valid > 0), full & (valid == end - start)
        return (touched.to(torch.uint8) + (touched & full).to(torch.uint8))[:, None]


class FunctionMask(AttentionMask):
    """A mask given as a predicate of broadcastable index tensors, `predicate(b, h, q, k) -> bool tensor`."""

    def __init__(
        self,
        predicate: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        batch: int,
        queries: int,
        keys: int,
        device: torch.device,
        heads: int = 1,
    ) -> None:
        super().__init__(batch, queries, keys, device, heads)
        self.predicate = predicate

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """See `AttentionMask.allowed`."""
        shape = torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape)
        return self.predicate(b, h, q, k).expand(shape)


class TensorMask(AttentionMask):
    """A boolean mask the caller holds: (batch or 1, heads or 1, queries, keys), True = may attend."""

    def __init__(self, tensor: Tensor) -> None:
        batch, heads, queries, keys = tensor.shape
        super().__init__(batch, queries, keys, tensor.device, heads)
        self.tensor = tensor

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """See `AttentionMask.allowed`."""
        b = b if self.batch > 1 else torch.zeros_like(b)
        h = h if self.heads > 1 else torch.zeros_like(h)
        return self.tensor[b, h, q, k]

    def rows(self, rows: Tensor) -> Tensor:
        """See `AttentionMask.rows`."""
        return self.tensor[:, :, rows]


def full_mask(queries: int, keys: int, device: torch.device, key_valid: Tensor | None = None) -> IntervalMask:
    """Every query sees every (valid) key."""
    first = torch.zeros(1, queries, dtype=torch.long, device=device)
    return IntervalMask(first, first + keys, keys, key_valid)


def causal_mask(
    queries: int,
    keys: int,
    device: torch.device,
    offset: int | Tensor | None = None,
    key_valid: Tensor | None = None,
) -> IntervalMask:
    """Query i sees keys j <= i + offset; `offset` defaults to keys - queries (the last query sees the last key)."""
    offset = keys - queries if offset is None else offset
    last = torch.arange(queries, device=device)[None] + 1 + offset
    return IntervalMask(torch.zeros_like(last), last, keys, key_valid)


def _batch_index(b: Tensor, owner: Tensor) -> Tensor:
    return b if owner.shape[0] > 1 else torch.zeros_like(b)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """One index of each kind of row (kinds,), and the kind of each of `rows` (n, columns): int64."""
    table = rows.cpu().numpy()
    bits = table.view(np.dtype((np.void, table.shape[1] * table.itemsize)))[:, 0]
    _, example, kind = np.unique(bits, return_index=True, return_inverse=True)
    return torch.from_numpy(example).to(rows.device), torch.from_numpy(kind).to(rows.device)


def _sum_tiles(rows: Tensor, key_tile: int) -> Tensor:
    """Number of True per key tile: (..., keys) -> (..., key_tiles)."""
    padding = -rows.shape[-1] % key_tile
    padded = torch.nn.functional.pad(rows, (0, padding))
    return padded.unflatten(-1, (-1, key_tile)).sum(-1)


def _per_tile(values: Tensor, tile: int, reduce: Callable[..., Tensor], fill: int) -> Tensor:
    """Reduce (batch, queries) over query tiles: (batch, query_tiles); the ragged end is padded with `fill`."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[-1] % tile), value=fill)
    return reduce(padded.unflatten(-1, (-1, tile)), -1)
