"""Loops of attention with one query, compiled by numba: scores of all keys, then the values of the kept tiles.

The cache comes from memory and is used once, so what counts is how few bytes are read. A work item is a block of keys
of one key head, for all query heads that share it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import KEYS, Bytes, Floats, Matrix, Numbers, Rule, aligned, entry, jit, load
from aat_hf.kernels.simd_dots import dots
from aat_hf.kernels.simd_emit import LANES, LOWEST, MASKED, PANEL

_BINS = 1 << 11  # values of `_bin`
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


@entry
def score(
    counter: Numbers, q: Floats, k: Matrix, span: Span, rule: Rule, weights: Floats, mass: Floats, top: Floats
) -> None:
    """Take blocks from the queue until it is empty: 2^(score - maximum of the block) of every key, sums by tile.

    Args:
        q: (batch * heads, dim) float32, times the rule's factor.
        weights: (batch * heads, blocks * block * key_tile); 0 for keys that are not seen, blocks without any are left.
        mass: (batch * heads, blocks * block) sums of `weights` by tile.
        top: (batch * heads, blocks) base-2 maxima; NaN where a score is not finite.
    """
    group, size = span.heads // span.kv_heads, span.block * span.key_tile
    scratch, state = aligned(KEYS * q.shape[1]), aligned(4 * PANEL).reshape(4, PANEL)
    padded = (size - 1) // PANEL * PANEL + PANEL
    line = aligned(group * padded).reshape(group, padded)
    while True:
        item = simd.take_number(counter.ctypes.data)
        if item >= len(span.starts) * top.shape[1]:
            return
        batch, owner, block, start, low, high = _work(item, span)
        for j in range(low, high, KEYS):
            rows = load(k, span.starts[owner] + j, min(KEYS, high - j), scratch)
            for g in range(group):
                _dots(q[owner * group + g], rows, line[g, j - start :])
        for g in range(group):
            head = owner * group + g
            if high == low:
                top[head, block] = LOWEST
                mass[head, block * span.block : (block + 1) * span.block] = 0
                continue
            if rule.capped:
                simd.cap_scores(line[g].ctypes.data, padded // PANEL, state.ctypes.data, rule.inner, rule.outer)
            _forbid(line[g], low - start, high - start, start, batch, span)
            top[head, block] = _soften(line[g], state)
            weights[head, start : start + size] = line[g, :size]
            for tile in range(span.block):
                part = line[g, tile * span.key_tile : (tile + 1) * span.key_tile]
                mass[head, block * span.block + tile] = _sum(part)


@jit
def _forbid(line: Floats, low: int, high: int, start: int, batch: int, span: Span) -> None:
    """Mask the scores of a block outside low .. high, and those of padding."""
    line[:low] = MASKED
    line[high:] = MASKED
    if span.valid.size:
        for j in range(low, high):
            if not span.valid[batch, start + j]:
                line[j] = MASKED


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
def choose(
    counter: Numbers, mass: Floats, top: Floats, sinks: Floats, tiles: int, tolerance: float, max_kept: float,
    rescale: Floats, kept: Bytes, sums: NDArray[np.float64],
) -> None:  # fmt: skip
    """Take heads from the queue until it is empty: the tiles without which at most `tolerance` of the head is lost.

    The order in which tiles are dropped is that of their masses, up to an eighth of a power of two.

    Args:
        mass, top: what `score` left; tiles: key tiles of a head.
        sinks: (heads,) base-2 logits of a virtual key, or empty.
        max_kept: if more than this fraction of the tiles with any mass were kept, all are.
        rescale: (batch * heads, blocks) becomes 2^(maximum of the block - maximum of the head).
        kept: (batch * heads, blocks * block) becomes 1 for tiles kept, else 0.
        sums: (batch * heads, 4) becomes the mass kept, that of all tiles, the sink's, and the maximum of the head.
    """
    block, bins = mass.shape[1] // top.shape[1], np.empty(_BINS, np.float64)
    while True:
        head = simd.take_number(counter.ctypes.data)
        if head >= mass.shape[0]:
            return
        sink = sinks[head % sinks.size] if sinks.size else np.float32(-np.inf)
        highest = max(sink, top[head].max())
        for b in range(top.shape[1]):
            rescale[head, b] = np.float32(2) ** (top[head, b] - highest)
        free, whole, alive = np.float64(2) ** (sink - highest), 0.0, 0
        bins[:] = 0
        for tile in range(tiles):
            mass[head, tile] *= rescale[head, tile // block]
            whole += mass[head, tile]
            alive += mass[head, tile] > 0
            bins[_bin(mass[head], tile)] += mass[head, tile]
        count, held = _drop(mass[head, :tiles], bins, tolerance * (whole + free), kept[head])
        if count > max_kept * alive:
            for tile in range(tiles):
                kept[head, tile] = mass[head, tile] > 0
            held = whole
        sums[head, 0], sums[head, 1], sums[head, 2], sums[head, 3] = held, whole, free, highest


@jit
def _bin(mass: Floats, tile: int) -> int:
    """A number that grows with the mass: its exponent and 3 bits of its mantissa."""
    return int(mass.view(np.uint32)[tile] >> np.uint32(20))


@jit
def _drop(mass: Floats, bins: NDArray[np.float64], spare: float, kept: Bytes) -> tuple[int, float]:
    """Drop the smallest tiles, `spare` of mass at most; returns the number and the mass of the others."""
    edge = 0
    while edge < bins.size and bins[edge] <= spare:
        spare -= bins[edge]
        edge += 1
    kept[:], count, held = 0, 0, 0.0
    for tile in range(mass.size):
        here = _bin(mass, tile)
        if here == edge and mass[tile] <= spare:
            spare -= mass[tile]
        elif here >= edge and mass[tile] > 0:
            kept[tile] = 1
            count += 1
            held += mass[tile]
    return count, held


@entry
def mix(counter: Numbers, v: Matrix, span: Span, weights: Floats, kept: Bytes, out: Floats) -> None:
    """Take blocks from the queue until it is empty: out (batch * heads, blocks, value_dim) = weights v of kept tiles.

    Args:
        kept: (batch * heads, blocks * block), 1 for tiles whose values are read.
    """
    group = span.heads // span.kv_heads
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
