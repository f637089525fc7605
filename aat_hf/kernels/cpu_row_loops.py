"""Loop of the row measurement, compiled by numba: tile probabilities of chosen query rows, exact or predicted.

A panel's log masses (`cpu_row_tiles`) become a softmax over its tiles once all are there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_bytes import BytePanel, round_panel
from aat_hf.kernels.cpu_matrices import Matrix, Rule, aligned, entry, jit, load
from aat_hf.kernels.cpu_row_tiles import (
    KEYS,
    LARGEST,
    TOTAL,
    Keys,
    Rows,
    Slots,
    Summary,
    address,
    exact_tiles,
    is_whole,
    predict_tiles,
    totals,
    whole_tiles,
)
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_dots import dots
from aat_hf.kernels.simd_emit import LOWEST, PANEL, VECTORS


@jit
def _pack_rows(q: Matrix, head: int, batch: int, panel: int, see: Rows, rule: Rule, small: bool, slots: Slots) -> None:
    """The panel's rows times the factor and their squares, transposed, and the keys that they see."""
    queries, squares = slots.queries, slots.squares
    for i in range(PANEL):  # far apart in memory: all are asked for before the first is needed
        row = head * see.queries + see.rows[min(panel * PANEL + i, len(see.rows) - 1)]
        simd.prefetch(
            q.wide[row:].ctypes.data if q.kind == 0 else q.bits[row:].ctypes.data, queries.size // PANEL // 16
        )
    for i in range(PANEL):
        row = see.rows[min(panel * PANEL + i, len(see.rows) - 1)]
        values = load(q, head * see.queries + row, 1, slots.scratch)
        for d in range(values.shape[1]):
            queries[d * PANEL + i] = values[0, d]
        slots.first[i] = see.first[min(batch, see.first.shape[0] - 1), row]
        slots.last[i] = see.last[min(batch, see.last.shape[0] - 1), row]
    for i in range(queries.size):
        squares[i] = (queries[i] * rule.scale) ** 2
    for i in range(queries.size):
        queries[i] *= rule.factor
    if small:
        round_panel(queries, slots.small_queries)
        round_panel(squares, slots.small_squares)


@jit
def _band(summary: Summary, see: Rows, batch: int, panel: int) -> tuple[int, int]:
    """First and one past the last tile that is exact for the panel's rows."""
    near = summary.near[min(batch, summary.near.shape[0] - 1)]
    low = high = near[see.rows[panel * PANEL]]
    for i in range(panel * PANEL, min((panel + 1) * PANEL, len(see.rows))):
        low, high = min(low, near[see.rows[i]]), max(high, near[see.rows[i]])
    return low, high + summary.width


@entry
def measure(
    counter: NDArray[np.int64], q: Matrix, k: Keys, see: Rows, summary: Summary, rule: Rule,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Take groups of rows from the queue until it is empty: whole rows of the result, a panel at least.

    Args:
        probability: (batch * heads * R / together, key_tiles), zeros; becomes the softmax summed over the tiles, mean
            of the rows that see a key.
        lse: (batch * heads * R,), natural; -inf for rows that see no key.
    """
    q, k, see, summary, probability, lse = borrowed((q, k, see, summary, probability, lse))
    dim, count, tiles = max(q.wide.shape[1], q.bits.shape[1]), len(see.rows), probability.shape[1]
    panels, groups = (count - 1) // PANEL + 1, max(1, summary.groups)
    share = max(1, see.together // PANEL)  # panels of a row of the result
    shares = (panels - 1) // share + 1
    memory = Slots(
        aligned(dim * PANEL), aligned(dim * PANEL), _bytes(dim), _bytes(dim), aligned(tiles * groups * PANEL),
        aligned(tiles * PANEL), np.empty(tiles, np.uint8), aligned(KEYS * PANEL), aligned(KEYS * PANEL),
        aligned(KEYS * dim), aligned(4 * PANEL).reshape(4, PANEL), aligned(PANEL * PANEL),
        np.empty(KEYS * PANEL, np.uint8), np.empty(PANEL, np.int64), np.empty(PANEL, np.int64),
    )  # fmt: skip
    slots = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= lse.size // count * shares:
            hold(memory)
            return
        part = shares - 1 - taken % shares  # a causal mask's longest rows first
        head = taken // shares
        for panel in range(part * share, min(part * share + share, panels)):
            _measure_panel(q, k, see, summary, rule, head, panel, slots, probability, lse)
        first, last = part * share * PANEL, min((part + 1) * share * PANEL, count)
        for row in range(first // see.together, (last - 1) // see.together + 1):
            alive = 0
            for i in range(row * see.together, (row + 1) * see.together):
                alive += lse[head * count + i] > -np.inf
            if alive > 1:
                probability[head * (count // see.together) + row] /= np.float32(alive)


@jit
def _bytes(dim: int) -> BytePanel:
    """Room for a rounded panel."""
    words = np.empty(((dim - 1) // 4 + 1) * PANEL, np.int32)
    return BytePanel(words, aligned(PANEL), aligned(PANEL), np.empty(PANEL, np.int32))


@jit
def _measure_panel(
    q: Matrix, k: Keys, see: Rows, summary: Summary, rule: Rule, head: int, panel: int, slots: Slots,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add one panel's softmax over the tiles to the result."""
    tiles, groups = probability.shape[1], max(1, summary.groups)
    batch = head // see.heads
    kv_head = batch * see.kv_heads + head % see.heads // (see.heads // see.kv_heads)
    _pack_rows(q, head, batch, panel, see, rule, k.small.scale.size > 0, slots)
    low, high = slots.first.min() // see.key_tile, (slots.last.max() - 1) // see.key_tile + 1
    inside = whole_tiles(see, slots)
    near, far, sink = low, high, high
    if summary.groups:
        near, far = _band(summary, see, batch, panel)
        sink = summary.sink
    logit = see.sinks[head % see.heads] if see.sinks.size else np.float32(-np.inf)
    slots.state[LARGEST] = max(LOWEST, logit)
    tile = low
    while tile < high:
        exact, whole = tile < sink or near <= tile < far, is_whole(see, batch, tile, inside)
        after = tile + max(1, KEYS // see.key_tile) if exact else high
        for edge in (high, sink, near, far, inside[0], inside[1]):  # where a tile's kind may change
            after = edge if tile < edge < after else after
        if see.valid.size:
            end, after = after, tile + 1
            while after < end and is_whole(see, batch, after, inside) == whole:
                after += 1
        if exact:
            exact_tiles(k, kv_head * see.keys, see, batch, tile, after - tile, groups, whole, rule, slots)
        else:
            first = kv_head * tiles * groups
            predict_tiles(summary, see, batch, first, tile, after - tile, whole, rule, slots)
        tile = after
    _normalise(slots, low, high, groups, logit, head * len(see.rows), panel * PANEL, see, probability, lse)


@jit
def _normalise(
    slots: Slots, low: int, high: int, groups: int, sink: np.float32, base: int, start: int, see: Rows,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Softmax over the tiles low .. high of one panel, the rows base + start of all; `sink` is one more logit."""
    state, share = slots.state, slots.share
    totals(slots, low, high, groups)
    count, width = min(PANEL, len(see.rows) - start), min(see.together, PANEL)
    share[:] = 0
    for i in range(count):
        total = state[TOTAL, i] + np.float32(2) ** (sink - state[LARGEST, i])
        lse[base + start + i] = (state[LARGEST, i] + math.log2(total)) * math.log(2) if total > 0 else -np.inf
        share[i // width * PANEL + i] = np.float32(1) / total if total > 0 else np.float32(0)
    means = slots.scores
    for tile in range(low, high, KEYS):
        tiles = min(KEYS, high - tile)
        masses = address(slots.mass, tile * groups)
        for lane in range(0, count, width):  # mean over the lanes that share a row of the result
            row, own = (base + start + lane) // see.together, address(share, lane // width)
            dots(masses, groups * PANEL, tiles, own, VECTORS, means.ctypes.data)
            for t in range(tiles):
                probability[row, tile + t] += means[t]
