"""Loops of attention with one query, compiled by numba: tile masses predicted, keys scored, values mixed.

The cache comes from memory and is used once, so what counts is how few bytes are read. A work item is a block of keys
of one key head, for all query heads that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import KEYS, Bytes, Floats, Matrix, Numbers, Rule, aligned, entry, jit, load
from aat_hf.kernels.simd_borrow import borrowed
from aat_hf.kernels.simd_dots import dots
from aat_hf.kernels.simd_emit import LANES, LOWEST, MASKED, PANEL

UNSEEN, SUMMARISED, SCORED = 0, 1, 2  # kinds of tiles: outside the mask; predicted; exact in every step
# Sums may be taken in any order, which makes them vectors; the micro-kernels' rounding must not be, hence not `jit`.
_sum_freely = njit(nogil=True, boundscheck=False, error_model="numpy", fastmath={"reassoc", "contract"})


class Span(NamedTuple):
    """What the one query of each batch entry may see, and how the keys are cut up.

    Attributes:
        first, last: (batch,) int64; the keys first <= j < last.
        valid: (batch or 0, keys) uint8, 0 marks padding.
        starts: (batch * kv_heads,) int64, row of the matrix where a head begins.
        heads, kv_heads: per batch entry; keys, key_tile: of a head; block: tiles of a work item.
    """

    first: Numbers
    last: Numbers
    valid: Bytes
    starts: Numbers
    heads: int
    kv_heads: int
    keys: int
    key_tile: int
    block: int


@jit
def _dots(q: Floats, k: Floats, out: Floats) -> None:
    """out (count,) = k (count, dim) q (dim,)."""
    count, dim = k.shape
    vectors = dim // LANES
    if vectors:
        dots(k.ctypes.data, dim, count, q.ctypes.data, vectors, out.ctypes.data)
    else:
        out[:count] = 0
    for d in range(vectors * LANES, dim):
        for j in range(count):
            out[j] += k[j, d] * q[d]


@_sum_freely
def _sum(x: Floats) -> np.float32:
    total = np.float32(0)
    for i in range(x.size):
        total += x[i]
    return total


@_sum_freely
def _add_values(weights: Floats, v: Floats, out: Floats) -> None:
    """out (dim,) += weights (count,) v (count, dim)."""
    count, dim = v.shape
    for j in range(0, count // 4 * 4, 4):
        w0, w1, w2, w3 = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for d in range(dim):
            out[d] += w0 * v[j, d] + w1 * v[j + 1, d] + w2 * v[j + 2, d] + w3 * v[j + 3, d]
    for j in range(count // 4 * 4, count):
        for d in range(dim):
            out[d] += weights[j] * v[j, d]


@jit
def _work(item: int, span: Span) -> tuple[int, int, int, int, int, int]:
    """Batch entry, key head (through the batch), block, its first key, and the keys low .. high seen in it."""
    size = span.block * span.key_tile
    blocks = (span.keys - 1) // size + 1
    owner, block = item // blocks, item % blocks
    batch, start = owner // span.kv_heads, block * size
    low = min(max(start, span.first[batch]), start + size)
    high = max(low, min(start + size, span.last[batch]))
    return batch, owner, block, start, low, high


@jit
def _log_masses(first: Floats, second: Floats, count: int, rule: Rule) -> None:
    """first = base-2 log mass of tiles of `count` keys, from q mean in `first` and q' Sigma q in `second`.

    As `aat_hf.tiling.moments.log_mass` with one group a tile.
    """
    unit = rule.inner * rule.outer if rule.capped else np.float32(1)
    log_n, log2 = np.float32(np.log(count)), np.float32(np.log(2))
    critical = np.sqrt(2 * log_n)
    for i in range(first.size):
        x = np.sqrt(max(second[i], np.float32(0))) * unit * log2
        spread = x * x / 2 if x < critical else critical * x - log_n
        first[i] = first[i] * unit + spread / log2
    if rule.capped:
        for i in range(first.size):
            first[i] = rule.outer * np.tanh(first[i] / rule.outer)
    first += log_n / log2


@jit
def _log_mass(q: Floats, rows: Floats, first: int, batch: int, span: Span, rule: Rule, scores: Floats) -> np.float32:
    """Exact base-2 log mass of the keys `rows` (count, dim), which begin at key `first`."""
    _dots(q, rows, scores)
    highest, total = LOWEST, np.float32(0)
    for j in range(len(rows)):
        scores[j] = rule.outer * np.tanh(rule.inner * scores[j]) if rule.capped else scores[j]
        if span.valid.size and not span.valid[batch, first + j]:
            scores[j] = MASKED
        highest = max(highest, scores[j])
    for j in range(len(rows)):
        total += np.float32(2) ** (scores[j] - highest)
    return highest + np.log2(total)


@entry
def predict(
    counter: Numbers, q: Floats, k: Matrix, means: Floats, variances: Floats, complete: int, kinds: Bytes,
    span: Span, rule: Rule, mass: Floats, top: Floats,
) -> None:  # fmt: skip
    """Take blocks of tiles from the queue until it is empty: 2^(log mass - maximum of the block) of every tile.

    Args:
        q: (batch * heads, dim) float32, times the rule's factor.
        means, variances: (batch * kv_heads, at least complete, dim), of the tiles that are `complete`.
        kinds: (batch, key_tiles), UNSEEN, SUMMARISED or SCORED.
        mass: (batch * heads, blocks * tiles of a block); top: (batch * heads, blocks), as in `score`.
    """
    q, k, means, variances, kinds, span, mass, top = borrowed((q, k, means, variances, kinds, span, mass, top))
    group, dim, block = span.heads // span.kv_heads, q.shape[1], mass.shape[1] // top.shape[1]
    scratch, state = aligned(span.key_tile * dim), aligned(4 * PANEL).reshape(4, PANEL)
    size = (block - 1) // PANEL * PANEL + PANEL
    line, second, squares, scores = aligned(size), aligned(size), aligned(dim), aligned(span.key_tile)
    while True:
        item = simd.take_number(counter.ctypes.data)
        if item >= len(span.starts) * top.shape[1]:
            return
        owner, place = item // top.shape[1], item % top.shape[1]
        batch, first = owner // span.kv_heads, place * block
        count = min(block, kinds.shape[1] - first)
        known = first + max(0, min(count, complete - first))
        for head in range(owner * group, (owner + 1) * group):
            line[:] = MASKED
            for d in range(dim):
                squares[d] = q[head, d] * q[head, d]
            _dots(q[head], means[owner, first:known], line)
            _dots(squares, variances[owner, first:known], second)
            _log_masses(line[: known - first], second[: known - first], span.key_tile, rule)
            for tile in range(count):
                kind = kinds[batch, first + tile]
                if kind == UNSEEN:
                    line[tile] = MASKED
                elif kind == SCORED:
                    low = max((first + tile) * span.key_tile, span.first[batch])
                    high = min((first + tile + 1) * span.key_tile, span.last[batch])
                    rows = load(k, span.starts[owner] + low, high - low, scratch)
                    line[tile] = _log_mass(q[head], rows, low, batch, span, rule, scores)
            top[head, place] = _soften(line, state)
            mass[head, first : first + block] = line[:block]


@jit
def _run(j: int, high: int, owner: int, opened: Bytes, key_tile: int) -> tuple[int, int]:
    """The next keys to score, j .. high at most and no more than `KEYS`; `opened` without elements: all."""
    if not opened.size:
        return j, min(j + KEYS, high)
    while j < high and not opened[owner, j // key_tile]:
        j = (j // key_tile + 1) * key_tile
    end = j
    while end < min(j + KEYS, high) and opened[owner, end // key_tile]:
        end = min((end // key_tile + 1) * key_tile, j + KEYS, high)
    return j, end


@entry
def score(
    counter: Numbers, q: Floats, k: Matrix, span: Span, rule: Rule, opened: Bytes, weights: Floats, mass: Floats,
    top: Floats,
) -> None:  # fmt: skip
    """Take blocks from the queue until it is empty: 2^(score - maximum of the block) of every key, sums by tile.

    Args:
        q: (batch * heads, dim) float32, times the rule's factor.
        opened: (batch * kv_heads, at least key_tiles), 1 for tiles whose keys are read; or no elements: all are.
        weights: (batch * heads, blocks * block * key_tile); 0 for keys that are not seen, blocks without any are left.
        mass: (batch * heads, blocks * block) sums of `weights` by tile.
        top: (batch * heads, blocks) base-2 maxima; NaN where a score is not finite.
    """
    group, size = span.heads // span.kv_heads, span.block * span.key_tile
    q, k, span, opened, weights, mass, top = borrowed((q, k, span, opened, weights, mass, top))
    scratch, state = aligned(KEYS * q.shape[1]), aligned(4 * PANEL).reshape(4, PANEL)
    padded = (size - 1) // PANEL * PANEL + PANEL
    line = aligned(group * padded).reshape(group, padded)
    while True:
        item = simd.take_number(counter.ctypes.data)
        if item >= len(span.starts) * top.shape[1]:
            return
        batch, owner, block, start, low, high = _work(item, span)
        j, end = _run(low, high, owner, opened, span.key_tile)
        empty = j >= high
        while j < high:
            rows = load(k, span.starts[owner] + j, end - j, scratch)
            for g in range(group):
                _dots(q[owner * group + g], rows, line[g, j - start :])
            j, end = _run(end, high, owner, opened, span.key_tile)
        for g in range(group):
            head = owner * group + g
            if empty:
                top[head, block] = LOWEST
                mass[head, block * span.block : (block + 1) * span.block] = 0
                continue
            if rule.capped:
                simd.cap_scores(line[g].ctypes.data, padded // PANEL, state.ctypes.data, rule.inner, rule.outer)
            _forbid(line[g], low - start, high - start, block, batch, owner, span, opened)
            top[head, block] = _soften(line[g], state)
            weights[head, start : start + size] = line[g, :size]
            for tile in range(span.block):
                part = line[g, tile * span.key_tile : (tile + 1) * span.key_tile]
                mass[head, block * span.block + tile] = _sum(part)


@jit
def _forbid(line: Floats, low: int, high: int, block: int, batch: int, owner: int, span: Span, opened: Bytes) -> None:
    """Mask the scores of a block outside low .. high, those of padding, and those of tiles that were not read."""
    line[:low] = MASKED
    line[high:] = MASKED
    start = block * span.block * span.key_tile
    if span.valid.size:
        for j in range(low, high):
            if not span.valid[batch, start + j]:
                line[j] = MASKED
    if opened.size:
        for tile in range(low // span.key_tile, (high - 1) // span.key_tile + 1):
            if not opened[owner, block * span.block + tile]:
                line[tile * span.key_tile : (tile + 1) * span.key_tile] = MASKED


@jit
def _soften(line: Floats, state: Floats) -> np.float32:
    """Scores to 2^(score - maximum); returns the maximum, NaN if a score is not finite."""
    highest, broken = state[1], state[3]
    state[0], highest[:], broken[:] = LOWEST, LOWEST, 0
    for row in range(0, line.size, PANEL):
        for i in range(PANEL):
            x = line[row + i]
            highest[i] = x if x > highest[i] else highest[i]
            broken[i] += x - x
    top, bad = LOWEST, np.float32(0)
    for i in range(PANEL):
        top = max(top, highest[i])
        bad += broken[i]
    state[1], state[2] = 0, top
    rest = state[0].ctypes.data, state[2].ctypes.data, state[1].ctypes.data, state[3].ctypes.data
    simd.soften(line.ctypes.data, line.size // PANEL, rest[0], rest[1], rest[2], rest[3])
    return top + bad


@entry
def mix(counter: Numbers, v: Matrix, span: Span, weights: Floats, kept: Bytes, out: Floats) -> None:
    """Take blocks from the queue until it is empty: out (batch * heads, blocks, value_dim) = weights v of kept tiles.

    Args:
        kept: (batch * heads, blocks * block), 1 for tiles whose values are read.
    """
    group = span.heads // span.kv_heads
    v, span, weights, kept, out = borrowed((v, span, weights, kept, out))
    scratch = aligned(span.key_tile * out.shape[2])
    while True:
        item = simd.take_number(counter.ctypes.data)
        if item >= len(span.starts) * out.shape[1]:
            return
        _, owner, block, start, low, high = _work(item, span)
        out[owner * group : (owner + 1) * group, block] = 0
        for tile in range(span.block):
            first = max(low, start + tile * span.key_tile)
            count = min(high, start + (tile + 1) * span.key_tile) - first
            here = block * span.block + tile
            wanted = np.uint8(0)
            for head in range(owner * group, (owner + 1) * group):
                wanted |= kept[head, here]
            if count <= 0 or not wanted:
                continue
            rows = load(v, span.starts[owner] + first, count, scratch)
            for head in range(owner * group, (owner + 1) * group):
                if kept[head, here]:
                    _add_values(weights[head, first : first + count], rows, out[head, block])
