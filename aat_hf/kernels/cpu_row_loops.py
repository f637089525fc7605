"""Loop of the row measurement, compiled by numba: tile probabilities of chosen query rows, exact or predicted.

`PANEL` rows of one head sit in vector lanes, see `cpu_matrices`. Each key tile gives a panel of base-2 log
masses, kept as maximum and total; the softmax over tiles follows when all are there.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import KEYS, Matrix, Rule, aligned, entry, jit, load
from aat_hf.kernels.simd import LOWEST, MASKED, PANEL
from aat_hf.kernels.simd_moments import cumulants, cumulants_capped


class Rows(NamedTuple):
    """Which rows see which keys.

    Attributes:
        rows: (R,) int64, query rows, ascending.
        first, last: (batch or 1, queries) int64, row i sees first[i] <= j < last[i].
        valid: (batch or 1, keys + 1) int64, number of valid keys before each; (0, 0) when all are.
        heads, kv_heads: of q and k.
        queries, keys, key_tile: lengths.
    """

    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    valid: NDArray[np.int64]
    heads: int
    kv_heads: int
    queries: int
    keys: int
    key_tile: int


class Summary(NamedTuple):
    """Moments of groups of keys, for prediction.

    Attributes:
        mean, variance: (batch * kv_heads * key_tiles * groups, head_dim) float32.
        critical, log_size: (key_tiles * groups,) float32: sqrt(2 ln n) and log2 n of each group.
        groups: of a tile; 0: nothing is predicted, every tile is exact.
        near: (batch or 1, queries) int64, first tile of each row's local band; `width` tiles are exact from there.
        sink: so many first tiles are exact.
        natural: factor of the squared scale * q, so that variances give natural scores.
    """

    mean: NDArray[np.float32]
    variance: NDArray[np.float32]
    critical: NDArray[np.float32]
    log_size: NDArray[np.float32]
    groups: int
    near: NDArray[np.int64]
    width: int
    sink: int
    softcap: np.float32


@jit
def _exact_tile(
    k: Matrix, k_first: int, see: Rows, batch: int, tile: int, whole: bool, first: NDArray[np.int64],
    last: NDArray[np.int64], rule: Rule, q_at: int, scores: NDArray[np.float32], state: NDArray[np.float32],
    allowed: NDArray[np.uint8], scratch: NDArray[np.float32], dim: int,
) -> None:  # fmt: skip
    """Maximum state[0] and total state[1] of a tile's exact scores; state is (4, PANEL)."""
    top, here = state[0].ctypes.data, state[2].ctypes.data
    key_end = min(tile * see.key_tile + see.key_tile, see.keys)
    valid = see.valid[min(batch, see.valid.shape[0] - 1)] if see.valid.size else see.valid.reshape(-1)
    for key in range(tile * see.key_tile, key_end, KEYS):
        keys = min(KEYS, key_end - key)
        k_at = load(k, k_first + key, keys, scratch).ctypes.data
        state[2] = state[0]
        if whole and not rule.capped:
            simd.scores_top(k_at, dim, keys, q_at, PANEL, scores.ctypes.data, PANEL, dim, here)
        else:
            simd.scores(k_at, dim, keys, q_at, PANEL, scores.ctypes.data, PANEL, dim, 0)
            if rule.capped:
                unused = here if whole else state[3].ctypes.data
                simd.cap_scores(scores.ctypes.data, keys, unused, rule.inner, rule.outer)
            if not whole:
                for j in range(keys):
                    exists = valid.size == 0 or valid[key + j + 1] > valid[key + j]
                    for i in range(PANEL):
                        allowed[j * PANEL + i] = exists and first[i] <= key + j < last[i]
                simd.mask_panel(scores.ctypes.data, PANEL, keys, allowed.ctypes.data, PANEL, here, MASKED)
        simd.soften(scores.ctypes.data, keys, top, here, state[1].ctypes.data, state[3].ctypes.data)


@jit
def _predicted_tile(
    summary: Summary, group: int, see: Rows, batch: int, tile: int, whole: bool, first: NDArray[np.int64],
    last: NDArray[np.int64], rule: Rule, q_at: int, square_at: int, scores: NDArray[np.float32],
    spreads: NDArray[np.float32], state: NDArray[np.float32], dim: int,
) -> None:  # fmt: skip
    """The same from the tile's moments, a cut tile weighted by the share of its keys that a row sees."""
    groups, place = summary.groups, tile * summary.groups
    one, log2e = np.float32(1), np.float32(1 / math.log(2))
    mean, variance = summary.mean[group + place :].ctypes.data, summary.variance[group + place :].ctypes.data
    simd.scores(mean, dim, groups, q_at, PANEL, scores.ctypes.data, PANEL, dim, 0)
    simd.scores(variance, dim, groups, square_at, PANEL, spreads.ctypes.data, PANEL, dim, 0)
    critical, size = summary.critical[place:].ctypes.data, summary.log_size[place:].ctypes.data
    at, spread_at, here = scores.ctypes.data, spreads.ctypes.data, state[2].ctypes.data
    state[2] = state[0]
    if rule.capped:
        inner, outer = one / summary.softcap, summary.softcap * log2e
        cumulants_capped(at, spread_at, groups, critical, size, here, rule.scale, one, inner, outer)
    else:
        cumulants(at, spread_at, groups, critical, size, here, one, log2e, one, one)
    simd.soften(at, groups, state[0].ctypes.data, here, state[1].ctypes.data, state[3].ctypes.data)
    if whole:
        return
    begin, end = tile * see.key_tile, min(tile * see.key_tile + see.key_tile, see.keys)
    for i in range(PANEL):
        low, high = max(first[i], begin), min(last[i], end)
        seen = max(high - low, 0)
        if see.valid.size and seen:
            before = see.valid[min(batch, see.valid.shape[0] - 1)]
            seen = before[high] - before[low]
        state[1, i] *= np.float32(seen / (end - begin))


@entry
def measure(
    counter: NDArray[np.int64], q: Matrix, k: Matrix, see: Rows, summary: Summary, rule: Rule,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Take panels of rows from the queue until it is empty.

    Args:
        probability: (batch * heads * R, key_tiles), zeros; becomes each row's softmax summed over the tiles.
        lse: (batch * heads * R,), natural; -inf for rows that see no key.
    """
    dim, count, tiles = max(q.wide.shape[1], q.bits.shape[1]), len(see.rows), probability.shape[1]
    panels = (count - 1) // PANEL + 1
    queries, squares = aligned(dim * PANEL), aligned(dim * PANEL)
    most = max(KEYS, summary.groups)
    scores, spreads, scratch = aligned(most * PANEL), aligned(most * PANEL), aligned(KEYS * dim)
    state = aligned(4 * PANEL).reshape(4, PANEL)
    tops, totals = aligned(tiles * PANEL), aligned(tiles * PANEL)
    allowed = np.empty(KEYS * PANEL, np.uint8)
    first, last, near = np.empty(PANEL, np.int64), np.empty(PANEL, np.int64), np.empty(PANEL, np.int64)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= lse.size // count * panels:
            return
        panel = panels - 1 - taken % panels  # a causal mask's longest rows first
        head = taken // panels
        batch = head // see.heads
        kv_head = batch * see.kv_heads + head % see.heads // (see.heads // see.kv_heads)
        for i in range(PANEL):
            row = see.rows[min(panel * PANEL + i, count - 1)]
            values = load(q, head * see.queries + row, 1, scratch)
            for d in range(dim):
                value = values[0, d]
                queries[d * PANEL + i] = value * rule.factor
                squares[d * PANEL + i] = (value * rule.scale) ** 2
            first[i], last[i] = (
                see.first[min(batch, see.first.shape[0] - 1), row], see.last[min(batch, see.last.shape[0] - 1), row]
            )  # fmt: skip
            if summary.groups:
                near[i] = summary.near[min(batch, summary.near.shape[0] - 1), row]
        low, high = first.min() // see.key_tile, (last.max() - 1) // see.key_tile + 1
        for tile in range(low, high):
            begin, end = tile * see.key_tile, min(tile * see.key_tile + see.key_tile, see.keys)
            whole = first.max() <= begin and last.min() >= end
            if see.valid.size:
                before = see.valid[min(batch, see.valid.shape[0] - 1)]
                whole = whole and before[end] - before[begin] == end - begin
            exact = summary.groups == 0 or tile < summary.sink
            for i in range(PANEL):
                exact |= near[i] <= tile < near[i] + summary.width
            state[0] = LOWEST
            state[1] = 0
            if exact:
                _exact_tile(
                    k, kv_head * see.keys, see, batch, tile, whole, first, last, rule, queries.ctypes.data, scores,
                    state, allowed, scratch, dim,
                )  # fmt: skip
            else:
                _predicted_tile(
                    summary, kv_head * tiles * summary.groups, see, batch, tile, whole, first, last, rule,
                    queries.ctypes.data, squares.ctypes.data, scores, spreads, state, dim,
                )  # fmt: skip
            tops[tile * PANEL : (tile + 1) * PANEL] = state[0]
            totals[tile * PANEL : (tile + 1) * PANEL] = state[1]
        _normalise(tops, totals, low, high, state, probability, lse, head * count, panel * PANEL, count)


@jit
def _normalise(
    tops: NDArray[np.float32], totals: NDArray[np.float32], low: int, high: int, state: NDArray[np.float32],
    probability: NDArray[np.float32], lse: NDArray[np.float32], base: int, start: int, count: int,
) -> None:  # fmt: skip
    """Softmax over the tiles low .. high of one panel, written to the rows base + start of the results."""
    live = min(PANEL, count - start)
    state[0], state[1], state[2] = LOWEST, 0, LOWEST
    for tile in range(low, high):
        for i in range(PANEL):
            if totals[tile * PANEL + i] > 0:
                state[2, i] = max(state[2, i], tops[tile * PANEL + i])
            else:
                tops[tile * PANEL + i] = MASKED
    if high > low:
        at, here = tops[low * PANEL :].ctypes.data, state[2].ctypes.data
        simd.soften(at, high - low, state[0].ctypes.data, here, state[1].ctypes.data, state[3].ctypes.data)
    state[1] = 0
    for tile in range(low, high):
        for i in range(PANEL):
            tops[tile * PANEL + i] *= totals[tile * PANEL + i]
            state[1, i] += tops[tile * PANEL + i]
    for i in range(live):
        total = state[1, i]
        row = base + start + i
        lse[row] = (state[2, i] + math.log2(total)) * math.log(2) if total > 0 else -np.inf
        inverse = np.float32(1) / total if total > 0 else np.float32(0)
        for tile in range(low, high):
            probability[row, tile] = tops[tile * PANEL + i] * inverse
