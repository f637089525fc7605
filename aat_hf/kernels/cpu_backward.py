"""Backward loops of the CPU kernel, compiled by numba: dQ of a run of query tiles, and its sums of dK and dV."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

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
    widen,
)
from aat_hf.kernels.cpu_sums import Sums, of_chunk
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_emit import LOWEST, PANEL

QUERIES = 64  # fewer than forward: P and dS of all of them are held too
LOG2E = np.float32(1 / math.log(2))
_jit_reassociate = njit(nogil=True, boundscheck=False, fastmath={"reassoc"})  # sums in vectors; still deterministic


class Backward(NamedTuple):
    """Buffers of one thread: Q^T, dO^T and dQ^T of all panels, Q and dO as rows, P and dS (KEYS, queries).

    Attributes:
        lse, delta: (queries,) base-2 log-sum-exp and sum of P dP less the gradient of the log-sum-exp.
        ones, unused: (PANEL,) a factor that changes nothing and a maximum that nobody reads.
        scratch, out_rows: converted rows.
        k, v: converted rows or centroids; then the products of a block of centroids, in padded rows.
    """

    q: Floats
    do: Floats
    dq: Floats
    q_rows: Floats
    do_rows: Floats
    p: Floats
    ds: Floats
    lse: Floats
    delta: Floats
    ones: Floats
    unused: Floats
    scratch: Floats
    out_rows: Floats
    k: Floats
    v: Floats


@_jit_reassociate
def _dot(x: Floats, y: Floats, row: int) -> Any:
    total = np.float32(0)
    for d in range(x.shape[1]):
        total += x[row, d] * y[row, d]
    return total


@jit
def _load_queries(
    at: int, count: int, q: Matrix, out: Matrix, d_out: Matrix, lse: Floats, d_lse: Floats, factor: np.float32,
    work: Backward,
) -> None:  # fmt: skip
    """Q and dO of `count` queries from row `at` on, as rows and as panels; log-sum-exp in base 2; sum P dP."""
    rows = load(q, at, count, work.scratch)
    dim = rows.shape[1]
    work.q_rows.fill(0)
    work.do_rows.fill(0)
    widen(rows, padded(dim), work.q_rows)
    for p in range(padded(count) // PANEL):
        pack(rows, p * PANEL, factor, work.q[p * dim * PANEL :])
    rows = load(d_out, at, count, work.scratch)
    dim = rows.shape[1]
    widen(rows, padded(dim), work.do_rows)
    for p in range(padded(count) // PANEL):
        pack(rows, p * PANEL, np.float32(1), work.do[p * dim * PANEL :])
    out_rows = load(out, at, count, work.out_rows)
    for i in range(work.lse.size):
        work.lse[i], work.delta[i] = -LOWEST, 0  # past the end, and rows without keys: every weight is 0
        if i < count and lse[at + i] > -np.inf:
            work.lse[i] = lse[at + i] * LOG2E
            work.delta[i] = _dot(rows, out_rows, i) - d_lse[at + i]


@jit
def _weights(
    p: int, k_at: int, v_at: int, dim: int, value_dim: int, keys: int, cut: int, inside: int, lane: int, left_out: bool,
    grid: Grid, rule: Rule, work: Backward,
) -> tuple[int, int]:  # fmt: skip
    """P and dS of panel `p` against `keys` rows of K and V, dQ += K^T dS; the range of keys that it sees."""
    width, low, high, one = work.lse.size, 0, keys, np.float32(1)
    if cut >= 0:
        low, high = seen_keys(grid.masks, cut, inside, keys, lane)
    if left_out:
        low, high = keys, 0
    for j in range(keys):
        if j < low or j >= high:
            for i in range(p * PANEL, (p + 1) * PANEL):
                work.p[j * width + i] = 0
                work.ds[j * width + i] = 0
    if low >= high:
        return low, high
    rows, place, panel = high - low, (low * width + p * PANEL) * 4, p * PANEL * 4
    p_at, ds_at = work.p.ctypes.data + place, work.ds.ctypes.data + place
    k_at, v_at = k_at + low * dim * 4, v_at + low * value_dim * 4
    simd.scores(k_at, dim, rows, work.q.ctypes.data + panel * dim, PANEL, p_at, width, dim, 0)
    simd.scores(v_at, value_dim, rows, work.do.ctypes.data + panel * value_dim, PANEL, ds_at, width, value_dim, 0)
    lse_at, delta_at = work.lse.ctypes.data + panel, work.delta.ctypes.data + panel
    if rule.capped:
        simd.gradient_capped(p_at, ds_at, width, rows, lse_at, delta_at, rule.scale, rule.inner, rule.outer)
    else:
        simd.gradient(p_at, ds_at, width, rows, lse_at, delta_at, rule.scale, one, one)
    if cut >= 0:
        step, unused = grid.masks.shape[2], work.unused.ctypes.data
        allowed = grid.masks.ctypes.data + (cut * grid.key_tile + inside + low) * step + lane
        simd.mask_panel(p_at, width, rows, allowed, step, unused, np.float32(0))
        simd.mask_panel(ds_at, width, rows, allowed, step, unused, np.float32(0))
    simd.mix_product(
        k_at, dim, dim, ds_at, width, work.dq.ctypes.data + panel * dim, PANEL, rows, work.ones.ctypes.data
    )
    return low, high


@jit
def _tile_gradients(
    tile: int, tiles: int, lane: int, count: int, first_row: int, k: Matrix, v: Matrix, grid: Grid, rule: Rule,
    work: Backward, skipped: Bytes, sum_k: Floats, sum_v: Floats,
) -> None:  # fmt: skip
    """`count` packed queries, from `lane` of their tile on, and adjoining key tiles: adds to dQ, dK and dV."""
    dim, value_dim = max(k.wide.shape[1], k.bits.shape[1]), max(v.wide.shape[1], v.bits.shape[1])
    wide, value_wide, width = sum_k.shape[1], sum_v.shape[1], work.lse.size
    key_first = grid.columns[tile] * grid.key_tile
    key_end = min(key_first + tiles * grid.key_tile, grid.keys)
    for key in range(key_first, key_end, KEYS):
        keys, inside = min(KEYS, key_end - key), key - key_first
        k_at = load(k, first_row + key, keys, work.k).ctypes.data
        v_at = load(v, first_row + key, keys, work.v).ctypes.data
        low, high = keys, 0
        for p in range(width // PANEL):
            at = lane + p * PANEL
            left_out = p * PANEL >= count or (rule.skip > -np.inf and skipped[tile, piece(at, inside, grid)] != 0)
            cut = grid.cuts[tile] if p * PANEL < count else -1
            a, b = _weights(p, k_at, v_at, dim, value_dim, keys, cut, inside, at, left_out, grid, rule, work)
            low, high = min(low, a), max(high, b)
        if low >= high:
            continue
        p_at, ds_at = work.p.ctypes.data + low * width * 4, work.ds.ctypes.data + low * width * 4
        for d in range(0, value_wide, PANEL):
            to = sum_v.ctypes.data + ((key + low) * value_wide + d) * 4
            rows = work.do_rows.ctypes.data + d * 4
            simd.add_product(p_at, width, high - low, rows, value_wide, to, value_wide, width, 0)
        for d in range(0, wide, PANEL):
            to = sum_k.ctypes.data + ((key + low) * wide + d) * 4
            simd.add_product(ds_at, width, high - low, work.q_rows.ctypes.data + d * 4, wide, to, wide, width, 0)


@jit
def _scatter_product(weights: Floats, rows: Floats, product: Floats, columns: Numbers, sums: Floats) -> None:
    """sums[columns] += weights (columns, queries) rows (queries, padded dim), by way of `product`."""
    wide = sums.shape[1]
    width = rows.size // wide
    product.fill(0)
    for d in range(0, wide, PANEL):
        rows_at, to = rows.ctypes.data + d * 4, product.ctypes.data + d * 4
        simd.add_product(weights.ctypes.data, width, columns.size, rows_at, wide, to, wide, width, 0)
    for j in range(columns.size):
        for d in range(wide):
            sums[columns[j], d] += product[j * wide + d]


@jit
def _centroid_gradients(
    row: int, count: int, kv_head: int, centroids: Centroids, grid: Grid, rule: Rule, work: Backward, sum_k: Floats,
    sum_v: Floats,
) -> None:  # fmt: skip
    """`count` packed queries of query tile `row` and the centroids of its coarse tiles: adds to dQ and to the sums."""
    dim, value_dim = centroids.k.shape[1], centroids.v.shape[1]
    width = work.lse.size
    tile, end = centroids.starts[row], centroids.starts[row + 1]
    while tile < end:
        keys, log_size = gather(centroids, tile, end, kv_head, grid, work.k, work.v)
        k_at, v_at = work.k.ctypes.data, work.v.ctypes.data
        for i in range(width):
            work.lse[i] -= log_size
        for p in range(width // PANEL):
            _weights(p, k_at, v_at, dim, value_dim, keys, -1, 0, 0, p * PANEL >= count, grid, rule, work)
        for i in range(width):
            work.lse[i] += log_size
        columns = centroids.columns[tile : tile + keys]
        _scatter_product(work.p, work.do_rows, work.v, columns, sum_v)
        _scatter_product(work.ds, work.q_rows, work.k, columns, sum_k)
        tile += keys


@entry
def backward(
    counter: Numbers, q: Matrix, k: Matrix, v: Matrix, out: Matrix, d_out: Matrix, lse: Floats, d_lse: Floats,
    grid: Grid, centroids: Centroids, rule: Rule, skipped: Bytes, edges: Numbers, d_q: Matrix, sum_k: Sums,
    sum_v: Sums, touched: Bytes, sum_mean_k: Floats, sum_mean_v: Floats,
) -> None:  # fmt: skip
    """Take chunks of query tiles, `edges[c] <= row < edges[c + 1]`, from the queue until it is empty.

    A chunk belongs to one head of k and v and sums its dK and dV in buffers of its own, always in the same order.

    Args:
        touched: (chunks, key_tiles) uint8, set where the chunk's sums hold something.
    """
    q, k, v, out, d_out, lse, d_lse, grid = borrowed((q, k, v, out, d_out, lse, d_lse, grid))
    centroids, skipped, edges, d_q, touched = borrowed((centroids, skipped, edges, d_q, touched))
    sum_k, sum_v, sum_mean_k, sum_mean_v = borrowed((sum_k, sum_v, sum_mean_k, sum_mean_v))
    wide, value_wide = sum_k.first.shape[2], sum_v.first.shape[2]
    dim, value_dim = max(q.wide.shape[1], q.bits.shape[1]), max(v.wide.shape[1], v.bits.shape[1])
    most = min(padded(grid.query_tile), QUERIES)
    memory = Backward(
        aligned(most * dim), aligned(most * value_dim), aligned(most * dim), aligned(most * wide),
        aligned(most * value_wide), aligned(KEYS * most), aligned(KEYS * most), aligned(most), aligned(most),
        aligned(PANEL), aligned(PANEL), aligned(most * max(dim, value_dim)), aligned(most * value_dim),
        aligned(KEYS * wide), aligned(KEYS * value_wide),
    )  # fmt: skip
    work = borrowed(memory)
    work.ones.fill(1)
    while True:
        chunk = simd.take_number(counter.ctypes.data)
        if chunk >= len(edges) - 1:
            hold(memory)
            return
        own_k, own_v = of_chunk(sum_k, chunk), of_chunk(sum_v, chunk)
        for row in range(edges[chunk], edges[chunk + 1]):
            head, kv_head, tile_first, tile_end = place(row, grid)
            for tile in range(grid.starts[row], grid.starts[row + 1]):
                column = grid.columns[tile]
                if not touched[chunk, column]:
                    touched[chunk, column] = 1
                    own_k[column * grid.key_tile : (column + 1) * grid.key_tile] = 0
                    own_v[column * grid.key_tile : (column + 1) * grid.key_tile] = 0
            for first in range(tile_first, tile_end, most):
                count, at, lane = min(tile_end - first, most), head * grid.queries + first, first - tile_first
                _load_queries(at, count, q, out, d_out, lse, d_lse, rule.factor, work)
                work.dq.fill(0)
                tile, end = grid.starts[row], grid.starts[row + 1]
                while tile < end:
                    tiles = adjoining(tile, 1, end, grid, rule)
                    _tile_gradients(
                        tile, tiles, lane, count, kv_head * grid.keys, k, v, grid, rule, work, skipped, own_k, own_v
                    )
                    tile += tiles
                if centroids.starts.size:
                    _centroid_gradients(
                        row, count, kv_head, centroids, grid, rule, work, sum_mean_k[chunk], sum_mean_v[chunk]
                    )
                for i in range(count):
                    if i % PANEL == 0:
                        unpack(work.dq[i * dim :], dim, work.ones, work.scratch)
                    store(d_q, at + i, work.scratch[i % PANEL * dim :])
