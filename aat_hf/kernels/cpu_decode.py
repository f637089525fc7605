"""Attention of a single query to a long cache: every score exact, values of the heaviest tiles only.

Nothing is estimated: the probability of each tile is the sum over its keys, so what a head loses is known, and never
above the tolerance. What is saved is reading the other tiles' values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.kernels import cpu_decode_loops as loops
from aat_hf.kernels.cpu import KINDS, as_rule
from aat_hf.kernels.cpu_matrices import Bytes, Floats, Matrix, Numbers
from aat_hf.kernels.cpu_threads import run
from aat_hf.tiling.masks import PARTIAL, IntervalMask
from aat_hf.tiling.tile_map import EXACT, TileMap

_BLOCK = 1024  # keys of a work item
_FROM_MEMORY = 8  # multiply-adds in the time of one whose operand is not in a cache


class DecodeResult(NamedTuple):
    """Attention of one query to the tiles kept.

    Attributes:
        output: (batch, heads, 1, value_dim); lse: (batch, heads, 1) of the keys kept, without sinks.
        tile_map: the tiles whose values were read.
        lost: (batch, heads, 1) probability of the others, exact; NaN where the query sees no key.
    """

    output: Tensor
    lse: Tensor
    tile_map: TileMap
    lost: Tensor


class _Scores(NamedTuple):
    """Weights 2^(score - maximum of the block).

    Attributes:
        weights: (batch * heads, at least keys).
        mass: (batch * heads, blocks * tiles of a block) their sums by tile.
        top: (batch * heads, blocks) the maxima; NaN where a score is not finite.
        span: what the loops know of the call.
    """

    weights: Floats
    mass: Floats
    top: Floats
    span: loops.Span


class _Choice(NamedTuple):
    """The tiles kept, as `loops.choose` leaves them."""

    rescale: Floats
    kept: Bytes
    sums: NDArray[np.float64]


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> DecodeResult | None:
    """Attention to the fewest tiles that hold 1 - tolerance of each head's probability.

    A value that is not finite has no effect in a tile that is not kept.

    Args:
        q: (batch, heads, 1, head_dim) float32, bfloat16 or float16, on the CPU.
        k: (batch, kv_heads, keys, head_dim); v: (batch, kv_heads, keys, value_dim).
        sinks: (heads,) logits of a virtual key without a value.

    Returns:
        None if a score is not finite, or if the heads of k or v are not whole rows in memory.
    """
    if not (_in_rows(k) and _in_rows(v)):
        return None
    scores = _score(q, k, mask, config.key_tile, scale, softcap)
    if bool(np.isnan(scores.top).any()):
        return None
    choice = _choose(scores, config, sinks)
    parts = _mix(v, scores, choice.kept)
    held, whole, free, top = (torch.from_numpy(x).view(*q.shape[:2], 1) for x in choice.sums.T.copy())
    total = np.maximum(choice.sums[:, 0] + choice.sums[:, 2], np.finfo(np.float32).tiny)  # 0 where no key is seen
    output = torch.from_numpy((parts * choice.rescale[..., None]).sum(1) / total[:, None])
    return DecodeResult(
        output.view(*q.shape[:3], -1).to(v.dtype),
        ((top + held.log2()) * math.log(2)).float(),
        _tile_map(choice.kept, mask, q.shape[:2], config),
        (whole - held) / (whole + free),
    )


def _in_rows(x: Tensor) -> bool:
    """Whether every head of x (batch, heads, length, dim) lies in memory row after row, wherever the heads begin."""
    dim = x.shape[3]
    return x.stride(3) == 1 and x.stride(2) == dim and x.stride(0) % dim == 0 and x.stride(1) % dim == 0


def _score(q: Tensor, k: Tensor, mask: IntervalMask, key_tile: int, scale: float, softcap: float | None) -> _Scores:
    batch, heads, _, dim = q.shape
    rule, (matrix, starts) = as_rule(scale, softcap, -math.inf), _matrix(k)
    first, last = (x.expand(batch, 1).flatten().contiguous().numpy() for x in (mask.first, mask.last))
    valid = np.empty((0, 0), np.uint8)
    if mask.key_valid is not None:
        valid = mask.key_valid.expand(batch, -1).contiguous().view(torch.uint8).numpy()
    tiles = max(1, _BLOCK // key_tile)
    span = loops.Span(first, last, valid, starts, heads, k.shape[1], k.shape[2], key_tile, tiles)
    blocks = -(-k.shape[2] // (tiles * key_tile))
    sizes = blocks * tiles * key_tile, blocks * tiles, blocks
    weights, mass, top = (np.empty((batch * heads, size), np.float32) for size in sizes)
    rows = (q.float() * float(rule.factor)).reshape(-1, dim).numpy()
    run(loops.score, _FROM_MEMORY * k.numel(), rows, matrix, span, rule, weights, mass, top)
    return _Scores(weights, mass, top, span)


def _choose(scores: _Scores, config: AATConfig, sinks: Tensor | None) -> _Choice:
    sums = np.empty((len(scores.top), 4))
    choice = _Choice(np.empty_like(scores.top), np.empty(scores.mass.shape, np.uint8), sums)
    logits = np.empty(0, np.float32) if sinks is None else (sinks.float() / math.log(2)).numpy()
    tiles = -(-scores.span.keys // scores.span.key_tile)
    limits = float(config.tolerance), float(config.max_kept)
    run(loops.choose, scores.mass.size, scores.mass, scores.top, logits, tiles, *limits, *choice)
    return choice


def _mix(v: Tensor, scores: _Scores, kept: Bytes) -> Floats:
    """Weighted values of the kept tiles, summed by block: (batch * heads, blocks, value_dim)."""
    matrix, starts = _matrix(v)
    parts = np.empty((*scores.top.shape, v.shape[3]), np.float32)
    work = _FROM_MEMORY * int(kept.sum()) * scores.span.key_tile * v.shape[3]
    run(loops.mix, work, matrix, scores.span._replace(starts=starts), scores.weights, kept, parts)
    return parts


def _tile_map(kept: Bytes, mask: IntervalMask, heads: Sequence[int], config: AATConfig) -> TileMap:
    """`kept` as one query tile; numpy, because a row of a long cache is enough for torch to wake its threads."""
    states = mask.tile_states(config.query_tile, config.key_tile)
    row, column = np.nonzero(kept)
    start = np.searchsorted(row, np.arange(len(kept) + 1))
    owner = row // heads[1] if states.shape[0] > 1 else np.zeros_like(row)
    return TileMap(
        row_start=torch.from_numpy(start),
        columns=torch.from_numpy(column),
        levels=torch.full((len(row),), EXACT, dtype=torch.uint8),
        cut=torch.from_numpy(states[:, 0, 0].numpy()[owner, column] == PARTIAL),
        states=states,
        shape=(heads[0], heads[1], 1, states.shape[3]),
        query_tile=config.query_tile,
        key_tile=config.key_tile,
    )


def _matrix(x: Tensor) -> tuple[Matrix, Numbers]:
    """The memory of a tensor that is `_in_rows` as one matrix, and the row at which each head begins."""
    batch, heads, length, dim = x.shape
    steps = x.stride(0) // dim, x.stride(1) // dim
    starts = (torch.arange(batch)[:, None] * steps[0] + torch.arange(heads) * steps[1]).flatten()
    rows = x.detach().as_strided((int(starts[-1]) + length, dim), (dim, 1))
    if KINDS[x.dtype]:
        return Matrix(np.empty((0, 0), np.float32), rows.view(torch.uint16).numpy(), KINDS[x.dtype]), starts.numpy()
    return Matrix(rows.numpy(), np.empty((0, 0), np.uint16), KINDS[x.dtype]), starts.numpy()
