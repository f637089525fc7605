"""Forward loop of the CPU kernel, compiled by numba: softmax attention over the tiles of one query tile at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import (
    KEYS,
    Bytes,
    Centroids,
    Floats,
    Grid,
    Matrix,
    Numbers,
    Rule,
    adjoining,
    aligned,
    entry,
    gather,
    jit,
    load,
    pack,
    padded,
    piece,
    place,
    seen_keys,
    store,
    unpack,
)
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_emit import LOWEST, MASKED, PANEL

QUERIES = 128  # queries whose Q^T and O^T are held at once
_SLACK = np.float32(1.0001)  # outweighs the rounding of the certificate


class Forward(NamedTuple):
    """Buffers of one thread: Q^T and O^T of all panels, scores of one, (panels, 5, PANEL) states, converted rows."""

    q: Floats
    out: Floats
    scores: Floats
    state: Floats
    scratch: Floats
    k: Floats
    v: Floats


@jit
def _attend(
    k_at: int, v_at: int, dim: int, value_dim: int, keys: int, allowed: int, allowed_step: int, rule: Rule,
    q_at: int, out_at: int, scores: int, state: Floats,
) -> bool:  # fmt: skip
    """One panel against `keys` rows of K and V; False when the skip rule left them out.

    `allowed` is the address of the mask's bytes or 0; `state` is (5, PANEL): running maximum, total, skipped mass,
    maximum here, rescale factor.
    """
    top, total, lost, here, rescale = state[0], state[1], state[2], state[3], state[4]
    skipping = rule.skip > -np.inf
    for i in range(PANEL):
        here[i] = MASKED if skipping else top[i]
    here_at = here.ctypes.data
    if rule.capped or allowed:
        simd.scores(k_at, dim, keys, q_at, PANEL, scores, PANEL, dim, 0)
        if rule.capped:
            unused = rescale if allowed else here
            simd.cap_scores(scores, keys, unused.ctypes.data, rule.inner, rule.outer)
        if allowed:
            simd.mask_panel(scores, PANEL, keys, allowed, allowed_step, here_at, MASKED)
    else:
        simd.scores_top(k_at, dim, keys, q_at, PANEL, scores, PANEL, dim, here_at)
    if skipping:
        relevant = False
        for i in range(PANEL):
            relevant |= here[i] - top[i] > rule.skip
        if not relevant:
            for i in range(PANEL):
                lost[i] += keys * 2.0 ** (here[i] - top[i])
            return False
        for i in range(PANEL):
            here[i] = max(here[i], top[i])
    simd.soften(scores, keys, top.ctypes.data, here_at, total.ctypes.data, rescale.ctypes.data)
    simd.mix_product(v_at, value_dim, value_dim, scores, PANEL, out_at, PANEL, keys, rescale.ctypes.data)
    if skipping:
        for i in range(PANEL):
            lost[i] *= rescale[i]
    return True


@jit
def _attend_tiles(
    tile: int, tiles: int, lane: int, count: int, first_row: int, k: Matrix, v: Matrix, grid: Grid, rule: Rule,
    work: Forward, skipped: Bytes,
) -> None:  # fmt: skip
    """`count` packed queries, from `lane` of their tile on, against adjoining key tiles of the head at `first_row`."""
    dim, value_dim = max(k.wide.shape[1], k.bits.shape[1]), max(v.wide.shape[1], v.bits.shape[1])
    cut, step = grid.cuts[tile], grid.masks.shape[2]
    key_first = grid.columns[tile] * grid.key_tile
    key_end = min(key_first + tiles * grid.key_tile, grid.keys)
    for key in range(key_first, key_end, KEYS):
        keys, inside = min(KEYS, key_end - key), key - key_first
        k_at = load(k, first_row + key, keys, work.k).ctypes.data
        v_at = load(v, first_row + key, keys, work.v).ctypes.data
        for p in range(padded(count) // PANEL):
            low, high, allowed = 0, keys, 0
            if cut >= 0:
                low, high = seen_keys(grid.masks, cut, inside, keys, lane + p * PANEL)
                if low >= high:
                    continue
                allowed = grid.masks.ctypes.data + (cut * grid.key_tile + inside + low) * step + lane + p * PANEL
            q_at, out_at = work.q.ctypes.data + p * dim * PANEL * 4, work.out.ctypes.data + p * value_dim * PANEL * 4
            done = _attend(
                k_at + low * dim * 4, v_at + low * value_dim * 4, dim, value_dim, high - low, allowed, step, rule, q_at,
                out_at, work.scores.ctypes.data, work.state[p],
            )  # fmt: skip
            if not done:
                skipped[tile, piece(lane + p * PANEL, inside, grid)] = 1


@jit
def _attend_centroids(
    row: int, at: int, count: int, kv_head: int, centroids: Centroids, grid: Grid, rule: Rule, work: Forward,
    lse_exact: Floats,
) -> None:  # fmt: skip
    """`count` packed queries, of query tile `row` and from `at` on, against the centroids of its coarse tiles.

    Writes the log-sum-exp of what came before.
    """
    dim, value_dim = centroids.k.shape[1], centroids.v.shape[1]
    for i in range(count):
        lse_exact[at + i] = _log_sum_exp(work.state[i // PANEL], i % PANEL)
    tile, end = centroids.starts[row], centroids.starts[row + 1]
    while tile < end:
        keys, log_size = gather(centroids, tile, end, kv_head, grid, work.k, work.v)
        for p in range(padded(count) // PANEL):
            state = work.state[p]
            state[0] -= log_size
            q_at, out_at = work.q.ctypes.data + p * dim * PANEL * 4, work.out.ctypes.data + p * value_dim * PANEL * 4
            _attend(
                work.k.ctypes.data, work.v.ctypes.data, dim, value_dim, keys, 0, 0, rule, q_at, out_at,
                work.scores.ctypes.data, state,
            )  # fmt: skip
            state[0] += log_size
        tile += keys


@jit
def _log_sum_exp(state: Floats, i: int) -> float:
    """Of lane `i` of a panel, natural."""
    return (state[0, i] + math.log2(state[1, i])) * math.log(2) if state[1, i] > 0 else -np.inf


@jit
def _finish(
    out_panel: Floats, state: Floats, row: int, count: int, out: Matrix,
    lse: Floats, lost: Floats, scratch: Floats,
) -> None:  # fmt: skip
    """Write the first `count` queries of a panel: output, natural log-sum-exp and the bound of what was skipped."""
    dim, inverse = max(out.wide.shape[1], out.bits.shape[1]), state[3]
    for i in range(PANEL):
        inverse[i] = np.float32(1) / state[1, i] if state[1, i] > 0 else np.float32(0)
    unpack(out_panel, dim, inverse, scratch)
    for i in range(count):
        store(out, row + i, scratch[i * dim :])
        lse[row + i] = _log_sum_exp(state, i)
        share = state[2, i] * inverse[i] * _SLACK
        lost[row + i] = share / (1 + share)


@entry
def forward(
    counter: Numbers, q: Matrix, k: Matrix, v: Matrix, grid: Grid, centroids: Centroids, rule: Rule, out: Matrix,
    lse: Floats, lost: Floats, skipped: Bytes, lse_exact: Floats,
) -> None:  # fmt: skip
    """Take query tiles, rows of `grid`, from the queue until it is empty.

    Args:
        skipped: (tiles, pieces) uint8, set to 1 where the skip rule left out a piece (panel and block of keys).
        lse_exact: with centroids, the log-sum-exp of the exact tiles alone; there is no skip rule then.
    """
    q, k, v, grid, centroids, out = borrowed((q, k, v, grid, centroids, out))
    lse, lost, skipped, lse_exact = borrowed((lse, lost, skipped, lse_exact))
    dim, value_dim = max(q.wide.shape[1], q.bits.shape[1]), max(v.wide.shape[1], v.bits.shape[1])
    most = min(padded(grid.query_tile), QUERIES)
    memory = Forward(
        aligned(most * dim), aligned(most * value_dim), aligned(KEYS * PANEL),
        aligned(most * 5).reshape(-1, 5, PANEL), aligned(most * max(dim, value_dim)), aligned(KEYS * dim),
        aligned(KEYS * value_dim),
    )  # fmt: skip
    work = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        row = len(grid.starts) - 2 - taken  # a causal mask's longest rows first
        if row < 0:
            hold(memory)
            return
        head, kv_head, tile_first, tile_end = place(row, grid)
        for first in range(tile_first, tile_end, most):
            count, at = min(tile_end - first, most), head * grid.queries + first
            rows = load(q, at, count, work.scratch)
            work.out.fill(0)
            for p in range(padded(count) // PANEL):
                pack(rows, p * PANEL, rule.factor, work.q[p * dim * PANEL :])
                for i in range(PANEL):
                    work.state[p, 0, i], work.state[p, 1, i], work.state[p, 2, i] = LOWEST, 0, 0
            lane, head_row = first - tile_first, kv_head * grid.keys
            begin, tile = grid.starts[row], grid.starts[row + 1]  # the sink, the diagonal, then backwards
            if begin < tile:
                tiles = adjoining(begin, 1, tile, grid, rule)
                _attend_tiles(begin, tiles, lane, count, head_row, k, v, grid, rule, work, skipped)
                begin += tiles
            while begin < tile:
                tiles = adjoining(tile - 1, -1, begin - 1, grid, rule)
                tile -= tiles
                _attend_tiles(tile, tiles, lane, count, head_row, k, v, grid, rule, work, skipped)
            if centroids.starts.size:
                _attend_centroids(row, at, count, kv_head, centroids, grid, rule, work, lse_exact)
            for p in range(padded(count) // PANEL):
                live = min(PANEL, count - p * PANEL)
                _finish(
                    work.out[p * value_dim * PANEL :], work.state[p], at + p * PANEL, live, out, lse, lost, work.scratch
                )
