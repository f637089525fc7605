"""What the loops of attention with one query are handed: the cache as matrices, the mask by tiles."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels import cpu_decode_loops as loops
from aat_hf.kernels.cpu import KINDS, as_rule
from aat_hf.kernels.cpu_decode_choose import choose
from aat_hf.kernels.cpu_matrices import Bytes, Floats, Matrix, Numbers, Rule
from aat_hf.kernels.cpu_threads import run
from aat_hf.tiling.layout import tiles
from aat_hf.tiling.masks import IntervalMask

BLOCK = 1024  # keys of a work item
FROM_MEMORY = 8  # multiply-adds in the time of one whose operand is not in a cache


class Step(NamedTuple):
    """One query and the keys it may see.

    Attributes:
        rows: (batch * heads, head_dim) float32, the query times the rule's factor.
        keys: the memory of all keys; span: what the loops know of the call; rule: how a score is made.
        seen: (batch or 1, key_tiles) keys of each tile that the query sees; sizes: (key_tiles,) keys of each tile.
    """

    rows: Floats
    keys: Matrix
    span: loops.Span
    rule: Rule
    seen: Numbers
    sizes: Numbers


class Choice(NamedTuple):
    """The tiles kept, as `choose` leaves them."""

    rescale: Floats
    kept: Bytes
    sums: NDArray[np.float64]


def as_step(q: Tensor, k: Tensor, mask: IntervalMask, key_tile: int, scale: float, softcap: float | None) -> Step:
    """The arguments of `cpu_decode.decode_attention` for the loops; k must be `in_rows`."""
    batch, heads, _, dim = q.shape
    rule, (keys, starts) = as_rule(scale, softcap, -math.inf), matrix(k)
    first, last = (np.broadcast_to(x.numpy()[:, 0], (batch,)).copy() for x in (mask.first, mask.last))
    valid = np.empty((0, 0), np.uint8)
    if mask.key_valid is not None:
        valid = np.broadcast_to(mask.key_valid.numpy(), (batch, k.shape[2])).astype(np.uint8)
    span = loops.Span(first, last, valid, starts, heads, k.shape[1], k.shape[2], key_tile, max(1, BLOCK // key_tile))
    edges = (np.arange(tiles(k.shape[2], key_tile) + 1) * key_tile).clip(max=k.shape[2])
    rows = (q.float() * float(rule.factor)).reshape(-1, dim).numpy()
    return Step(rows, keys, span, rule, _seen(span, edges), np.diff(edges))


def in_rows(x: Tensor) -> bool:
    """Whether every head of x (batch, heads, length, dim) lies in memory row after row, wherever the heads begin."""
    dim = x.shape[3]
    return x.stride(3) == 1 and x.stride(2) == dim and x.stride(0) % dim == 0 and x.stride(1) % dim == 0


def matrix(x: Tensor) -> tuple[Matrix, Numbers]:
    """The memory of a tensor that is `in_rows` as one matrix, and the row at which each head begins."""
    batch, heads, length, dim = x.shape
    steps = x.stride(0) // dim, x.stride(1) // dim
    starts = (np.arange(batch)[:, None] * steps[0] + np.arange(heads) * steps[1]).ravel()
    rows = x.detach().as_strided((int(starts[-1]) + length, dim), (dim, 1))
    if KINDS[x.dtype]:
        return Matrix(np.empty((0, 0), np.float32), rows.view(torch.uint16).numpy(), KINDS[x.dtype]), starts
    return Matrix(rows.numpy(), np.empty((0, 0), np.uint16), KINDS[x.dtype]), starts


def chosen(
    mass: Floats, top: Floats, sinks: Tensor | None, tiles: int, tolerances: NDArray[np.float64], max_kept: float
) -> Choice:
    """The fewest of the tiles that hold all but `tolerances` (batch * heads,) of each head's mass; see `choose`."""
    logits = np.empty(0, np.float32) if sinks is None else (sinks.float() / math.log(2)).numpy()
    choice = Choice(np.empty_like(top), np.empty(mass.shape, np.uint8), np.empty((len(top), 4)))
    run(choose, mass.size, mass, top, logits, tiles, tolerances, float(max_kept), *choice)
    return choice


def _seen(span: loops.Span, edges: Numbers) -> Numbers:
    """Keys of each tile that the query sees: (batch, key_tiles)."""
    low, high = (edges[None].clip(span.first[:, None], span.last[:, None])[:, part] for part in (_LOW, _HIGH))
    if not span.valid.size:
        return high - low
    before = np.pad(span.valid.cumsum(1, np.int64), ((0, 0), (1, 0)))
    return np.take_along_axis(before, high, 1) - np.take_along_axis(before, low, 1)


_LOW, _HIGH = slice(None, -1), slice(1, None)  # of the edges of tiles
