"""Tile probabilities of chosen query rows on the CPU, measured or predicted; the torch side of `cpu_row_loops`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from aat_hf.kernels import cpu_row_loops as loops
from aat_hf.kernels.cpu import as_matrix, as_rule
from aat_hf.kernels.cpu_bytes import NO_BYTES, byte_rows
from aat_hf.kernels.cpu_matrices import Matrix
from aat_hf.kernels.cpu_row_data import Keys, Rows, Summary
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_bytes import BYTES
from aat_hf.kernels.simd_emit import PANEL
from aat_hf.tiling.masks import IntervalMask
from aat_hf.tiling.measure import RoughKeys
from aat_hf.tiling.moments import Moments

_NO_BITS = np.empty((0, 0), np.uint16)
_NO_ROWS, _NO_NUMBERS = np.empty((0, 0), np.float32), np.empty(0, np.float32)
_NO_SUMMARY = Summary(
    _NO_ROWS, _NO_ROWS, NO_BYTES, NO_BYTES, _NO_NUMBERS, _NO_NUMBERS, 0, np.empty((0, 0), np.int64), 0, 0, np.float32(0)
)


def measure_rows(
    q: Tensor,
    k: Tensor,
    mask: IntervalMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None = None,
    moments: Moments | None = None,
    near: Tensor | None = None,
    near_tiles: int = 0,
    sink_tiles: int = 0,
    sinks: Tensor | None = None,
    together: int = 1,
    rough: RoughKeys | None = None,
) -> tuple[Tensor, Tensor]:
    """Probability of every key tile for the query `rows`, and their log-sum-exp.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        rows: (R,) int64.
        moments: with them, tiles outside the local band and the sink are predicted by second-order moments.
        near: (batch or 1, queries) int64, first tile of each row's local band of `near_tiles` tiles. A band is that
            of a whole group of neighbouring rows, so that some more tiles may be exact.
        sinks: (heads,) logits of one more key, which belongs to no tile.
        together: so many consecutive rows share a row of the first result: the mean of those that see a key.
        rough: of q and k; with it exponentials may be 4 % off, and scores come from rows rounded to 8 bits where the
            processor is faster with them and that is accurate enough.

    Returns:
        (batch, heads, R / together, key_tiles) and (batch, heads, R), both float32.
    """
    if PANEL % together and together % PANEL:
        how = (q, k, mask, rows, key_tile, scale, softcap, moments, near, near_tiles, sink_tiles, sinks)
        probability, lse = measure_rows(*how, rough=rough)
        alive = (lse > float("-inf")).unflatten(2, (-1, together)).sum(-1).clamp(min=1)
        return probability.unflatten(2, (-1, together)).sum(3) / alive[..., None], lse
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    valid = np.empty((0, 0), np.int64)
    if mask.key_valid is not None:
        valid = torch.nn.functional.pad(mask.key_valid.long().cumsum(-1), (1, 0)).numpy()
    logits = np.empty(0, np.float32) if sinks is None else (sinks.float() / math.log(2)).numpy()
    edges = _whole(mask.first), _whole(mask.last), valid
    see = Rows(rows.numpy(), together, logits, *edges, heads, k.shape[1], queries, keys, key_tile, rough is not None)
    small = rough.rounded if rough is not None and BYTES else None
    summary = _NO_SUMMARY
    if moments is not None:
        assert near is not None
        summary = _summary(moments, near, near_tiles, sink_tiles, softcap, small is not None)
    probability = torch.zeros(batch, heads, len(rows) // together, -(-keys // key_tile))
    lse = torch.empty(batch, heads, len(rows))
    flat = probability.view(-1, probability.shape[3]).numpy(), lse.view(-1).numpy()
    work = together * probability.numel() * q.shape[3] * (key_tile if moments is None else 2 * moments.count.shape[1])
    all_keys = Keys(as_matrix(k), NO_BYTES if small is None else small)
    run(loops.measure, work, as_matrix(q), all_keys, see, summary, as_rule(scale, softcap, -float("inf")), *flat)
    return probability, lse


def _summary(
    moments: Moments, near: Tensor, near_tiles: int, sink_tiles: int, softcap: float | None, rough: bool
) -> Summary:
    """The moments as matrices; rounded ones in their place if `rough`."""
    size = moments.count.flatten().float()
    mean, variance = (x.flatten(0, -2).contiguous().numpy() for x in (moments.mean, moments.variance))
    small_mean, small_variance = NO_BYTES, NO_BYTES
    if rough:
        small_mean, small_variance = (byte_rows(Matrix(x, _NO_BITS, 0)) for x in (mean, variance))
    return Summary(
        mean,
        variance,
        small_mean,
        small_variance,
        (2 * size.clamp(min=1).log()).sqrt().numpy(),
        size.log2().clamp(min=-1e30).numpy(),
        moments.count.shape[1],
        _whole(near),
        near_tiles,
        sink_tiles,
        np.float32(softcap or 0),
    )


def _whole(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return x.contiguous().numpy()
