"""Tiled attention on a Vulkan device: forward and backward over the exact tiles of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from aat_hf.kernels.lowered_tiles import lower_tiles
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import lowering, profile
from aat_hf.vulkan.interface import Dispatch, Provider, float_bits
from aat_hf.vulkan.lowering import KINDS, TileList, TileWords, join_tiles, joinable, part_of, vectors
from aat_hf.vulkan.shapes import OTHER, Shape, variant
from aat_hf.vulkan.workspace import Workspace

_LOG2E = 1 / math.log(2)
_PARTS = 4  # of a long call, computed one after the other
_PART_PRODUCTS = 1 << 34  # of a part: about what a fast device computes while the host prepares another
_NEVER = 1e30  # base-2 log-sum-exp of rows without keys: every weight becomes 0


@dataclass(frozen=True)
class Call:
    """What does not change between forward and backward.

    Attributes:
        lower: makes `tiles` when it is called first, and keeps them.
        shape: (batch, heads, query_tiles, key_tiles) of their map.
        query_tile, key_tile: rows and keys of a tile; pairs: of a query and a key, in all tiles.
        scale, softcap: the score is softcap(scale * q k).
        skip_below: blocks of keys whose scores all lie this far below the running maximum are left out; -inf: none.
    """

    lower: Callable[[], TileList]
    shape: tuple[int, int, int, int]
    query_tile: int
    key_tile: int
    pairs: int
    scale: float
    softcap: float | None = None
    skip_below: float = -math.inf

    @classmethod
    def of(
        cls, tile_map: TileMap, mask: AttentionMask, scale: float, softcap: float | None = None,
        skip_below: float = -math.inf,
    ) -> Call:  # fmt: skip
        """Attention over the exact tiles of a map."""
        sizes = tile_map.shape, tile_map.query_tile, tile_map.key_tile
        pairs = len(tile_map.columns) * tile_map.query_tile * tile_map.key_tile
        return cls(cache(lambda: TileList(*lower_tiles(tile_map, mask))), *sizes, pairs, scale, softcap, skip_below)

    @property
    def tiles(self) -> TileList:
        """The exact tiles."""
        return self.lower()

    @property
    def skips(self) -> bool:
        """Whether anything may be left out."""
        return self.skip_below > -math.inf

    @property
    def joined(self) -> Call:
        """The same pairs in key tiles as long as a block of keys, for shaders whose workgroups own queries.

        Not for those that own keys, which take tiles of any length without loss, and not under the skip rule, which
        keeps account of single tiles.
        """
        return self if self.skips or joinable(self.key_tile) == 1 else self._joined

    @cached_property
    def _joined(self) -> Call:
        count, lower = joinable(self.key_tile), self.lower  # not self: it would be part of a cycle
        batch, heads, query_tiles, key_tiles = self.shape
        shape = batch, heads, query_tiles, -(-key_tiles // count)
        joined = cache(lambda: join_tiles(lower(), key_tiles, count))
        return replace(self, lower=joined, shape=shape, key_tile=count * self.key_tile)

    def heads(self, first: int, last: int, shape: tuple[int, int, int, int]) -> Call:
        """Only the heads [first, last), counted through all batch rows; `shape` is that of their map."""
        lower, rows = self.lower, self.shape[2]
        return replace(self, lower=cache(lambda: part_of(lower(), first * rows, last * rows)), shape=shape)


class Skipped(NamedTuple):
    """What the skip rule left out.

    Attributes:
        pieces: (tiles, blocks of `rows` queries, blocks of `OTHER` keys) uint32, not 0 where it was left out.
        rows: queries of a piece.
    """

    pieces: lowering.Words
    rows: int


class Forward(NamedTuple):
    """Results of `forward`.

    Attributes:
        output: (batch, heads, queries, value_dim) in v's dtype; lse: (batch, heads, queries) float32.
        lost: (batch, heads, queries) float32, upper bound of the probability that the skip rule left out.
    """

    output: Tensor
    lse: Tensor
    lost: Tensor
    skipped: Skipped


def forward(provider: Provider, q: Tensor, k: Tensor, v: Tensor, call: Call, shape: Shape | None = None) -> Forward:
    """Output and log-sum-exp; q, k, v on the CPU as in `aat_hf.kernels.gather.gather_attention`.

    Raises:
        OutOfDeviceMemoryError, VulkanLimitError: the call does not fit the device; nothing was computed.
    """
    shape = shape or _shape(provider, "forward", q, v, call.query_tile)
    output = lowering.fresh((*q.shape[:3], v.shape[3]), v.dtype)
    lse, lost = torch.empty(q.shape[:3]), torch.empty(q.shape[:3])
    skipped = Skipped(np.zeros((1, 1, 1), np.uint32), shape.own)
    with Workspace(provider) as work:
        started = []
        for own, shared, some in _parts(provider, q, k, v, call):
            dispatch = forward_dispatch(work, provider, q[own], k[shared], v[shared], some, shape)
            fetched = dispatch.buffers[4:] if call.skips else dispatch.buffers[4:6]
            started.append((work.start(dispatch, fetch=fetched), dispatch, own))
        for wait, dispatch, own in started:
            wait()
            read_forward(dispatch, output[own], lse[own], lost[own])
        if call.skips:
            pieces = lowering.read_words(dispatch.buffers[6], _pieces(call, shape.own), np.uint32)
            skipped = Skipped(pieces, shape.own)
    return Forward(output, lse, lost, skipped)


_Places: TypeAlias = tuple[slice, slice]  # batch rows and heads


def _parts(provider: Provider, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Iterator[tuple[_Places, _Places, Call]]:
    """Parts of a long call, of which one is copied while others are computed: places in q, in k and v, and the call."""
    batch, kv_heads = k.shape[:2]
    group, whole, count = q.shape[1] // kv_heads, kv_heads if batch == 1 else batch, 1
    if provider.overlaps and not call.skips:
        count = max(1, min(_PARTS, call.pairs * (q.shape[3] + v.shape[3]) // _PART_PRODUCTS, whole))
    if count == 1:
        yield (slice(None), slice(None)), (slice(None), slice(None)), call
        return
    call = call.joined
    for a, b in pairwise(whole * part // count for part in range(count + 1)):
        if batch > 1:
            heads, places = q.shape[1], ((slice(a, b), slice(None)), (slice(a, b), slice(None)))
            yield *places, call.heads(a * heads, b * heads, (b - a, *call.shape[1:]))
        else:
            shape = 1, (b - a) * group, *call.shape[2:]
            places = (slice(None), slice(a * group, b * group)), (slice(None), slice(a, b))
            yield *places, call.heads(a * group, b * group, shape)


def forward_dispatch(
    work: Workspace, provider: Provider, q: Tensor, k: Tensor, v: Tensor, call: Call, shape: Shape
) -> Dispatch:
    """The forward shader on buffers of `work`; the last three are output, rows (lse and bound) and skipped pieces."""
    call = call.joined
    results = lowering.room((*q.shape[:3], v.shape[3])), 8 * q.shape[:3].numel()
    at_q, at_k, at_v, output, rows = work.buffers(q, k, v, *results)  # on their way while the map is lowered
    words = lowering.by_rows(call.tiles, call.query_tile)
    skipped = np.zeros(_pieces(call, shape.own), np.uint32) if call.skips else 4
    in_rows, pieces = work.buffers(words.words, skipped)
    return Dispatch(
        variant("attention_forward", provider.device),
        (at_q, at_k, in_rows, at_v, output, rows, pieces),
        (call.shape[2] * _blocks(call.query_tile, shape), q.shape[1], q.shape[0]),
        _spec(shape, q, v, call),
        _push(q, k, call, words, shape.own),
    )


def read_forward(dispatch: Dispatch, output: Tensor, lse: Tensor, lost: Tensor) -> None:
    """Fill the results of `Forward` from what `forward_dispatch` computed, once its buffers are downloaded."""
    lowering.read_rows(dispatch.buffers[4], output)
    rows = torch.from_numpy(lowering.read_words(dispatch.buffers[5], (*lse.shape, 2), np.float32))
    lse.copy_(rows[..., 0])
    lost.copy_(rows[..., 1])


def backward(
    provider: Provider,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    call: Call,
    skipped: Skipped,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from those of output and log-sum-exp, in the dtypes of q, k, v.

    Args:
        inputs: q, k, v; results: output and lse of `forward`; gradients: of these two; skipped: by `forward`.

    Raises:
        OutOfDeviceMemoryError, VulkanLimitError: the call does not fit the device; nothing was computed.
    """
    q, v = inputs[::2]
    shapes = _shape(provider, "queries", q, v, call.query_tile), _shape(provider, "keys", q, v, call.key_tile)
    with Workspace(provider) as work:
        dispatches = backward_dispatches(work, inputs, results, gradients, call, skipped, shapes)
        fetched = dispatches[0].buffers[6], *dispatches[1].buffers[6:8]
        work.run(*dispatches, fetch=fetched)
        d_q, d_k, d_v = (
            lowering.read_rows(buffer, lowering.fresh(x.shape, x.dtype))
            for buffer, x in zip(fetched, inputs, strict=True)
        )
        return d_q, d_k, d_v


def backward_dispatches(
    work: Workspace,
    inputs: tuple[Tensor, Tensor, Tensor],
    results: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    call: Call,
    skipped: Skipped,
    shapes: tuple[Shape, Shape],
) -> tuple[Dispatch, Dispatch]:
    """The shader of the gradient of q (binding 6), and that of the gradients of k and v (6 and 7), as `backward`."""
    (q, k, v), (for_q, for_k) = inputs, shapes
    d_output, d_lse = (x.float() for x in gradients)
    delta = (d_output * results[0].float()).sum(-1) - d_lse
    rows = torch.stack([(results[1] * _LOG2E).nan_to_num(neginf=_NEVER), delta], -1)
    joined = call.joined
    by_rows = lowering.by_rows(joined.tiles, joined.query_tile)
    by_columns = lowering.by_columns(call.tiles, call.shape, k.shape[1], call.query_tile)
    at_q, at_k, at_v, in_rows, in_columns, at_d, sums, pieces, d_q, d_k, d_v = work.buffers(
        q, k, v, by_rows.words, by_columns.words, d_output, rows.numpy(), skipped.pieces,
        *(lowering.room(x.shape) for x in inputs),
    )  # fmt: skip
    return (
        Dispatch(
            "attention_backward_queries",
            (at_q, at_k, in_rows, at_v, at_d, sums, d_q, pieces),
            (call.shape[2] * _blocks(call.query_tile, for_q), q.shape[1], q.shape[0]),
            _spec(for_q, q, v, call),
            _push(q, k, joined, by_rows, skipped.rows),
        ),
        Dispatch(
            "attention_backward_keys",
            (at_q, at_k, in_columns, at_v, at_d, sums, d_k, d_v, pieces),
            (call.shape[3] * _blocks(call.key_tile, for_k), k.shape[1], k.shape[0]),
            _spec(for_k, q, v, call),
            _push(q, k, call, by_columns, skipped.rows),
        ),
    )


def _shape(provider: Provider, role: str, q: Tensor, v: Tensor, tile: int) -> Shape:
    return profile.shape(provider.device, role, vectors(q.shape[3]), vectors(v.shape[3]), tile)


def _blocks(tile: int, shape: Shape) -> int:
    """Workgroups that share a tile."""
    return -(-tile // shape.own)


def _pieces(call: Call, own: int) -> tuple[int, int, int]:
    """Shape of `Forward.skipped`; one word when nothing can be skipped."""
    if not call.skips:
        return 1, 1, 1
    return max(1, len(call.tiles.columns)), -(-call.query_tile // own), -(-call.key_tile // OTHER)


def _spec(shape: Shape, q: Tensor, v: Tensor, call: Call) -> tuple[int, ...]:
    """Specialisation constants of tiles.glsl."""
    sizes = shape.threads, shape.rows, shape.chunk, vectors(q.shape[3]), vectors(v.shape[3])
    return *sizes, KINDS[q.dtype], int(call.softcap is not None), int(call.skips)


def _push(q: Tensor, k: Tensor, call: Call, words: TileWords, piece_rows: int) -> tuple[int, ...]:
    """Push constants of tiles.glsl."""
    sizes = q.shape[1], k.shape[1], q.shape[2], k.shape[2], call.query_tile, call.key_tile, *call.shape[2:]
    places = words.columns_at, words.cuts_at, words.entries_at, words.masks_at, words.mask_words
    cap = call.softcap or 1.0
    skip = max(call.skip_below * _LOG2E, -_NEVER)
    numbers = call.scale * _LOG2E, call.scale / cap, cap * _LOG2E, skip
    return *sizes, *places, piece_rows, -(-call.key_tile // OTHER), *map(float_bits, numbers)
