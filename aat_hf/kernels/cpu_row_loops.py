"""Loop of the row measurement, compiled by numba: tile probabilities of chosen query rows, exact or predicted.

A panel's log masses (`cpu_row_tiles`) become a softmax over its tiles once all are there.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_bytes import empty_panel, fill_panel
from aat_hf.kernels.cpu_matrices import Matrix, Rule, aligned, entry, inlined, load
from aat_hf.kernels.cpu_row_data import KEYS, LARGEST, TOTAL, Keys, Rows, Slots, Summary
from aat_hf.kernels.cpu_row_tiles import exact_tiles, is_whole, predict_tiles, totals, whole_tiles
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_emit import LANES, LOWEST, PANEL
from aat_hf.kernels.simd_transpose import add_rows, transpose, transpose_each


@inlined
def _pack_rows(
    q: Matrix, head: int, batch: int, panel: int, see: Rows, rule: Rule, k: Keys, squared: bool, slots: Slots
) -> None:
    """The panel's rows times the factor, and their squares if wanted, transposed, and the keys that they see."""
    queries, squares, dim = slots.queries, slots.squares, max(q.wide.shape[1], q.bits.shape[1])
    width = queries.size // PANEL
    for i in range(PANEL):  # far apart in memory: all are asked for before the first is needed
        row = head * see.queries + see.rows[min(panel * PANEL + i, len(see.rows) - 1)]
        simd.prefetch(q.wide[row:].ctypes.data if q.kind == 0 else q.bits[row:].ctypes.data, (dim - 1) // 16 + 1)
    for i in range(PANEL):
        row = see.rows[min(panel * PANEL + i, len(see.rows) - 1)]
        place = slots.scratch[i * width : (i + 1) * width]
        values = load(q, head * see.queries + row, 1, place)
        for d in range(dim if q.kind == 0 else 0):  # others are converted in place
            place[d] = values[0, d]
        place[dim:] = 0
        slots.first[i] = see.first[min(batch, see.first.shape[0] - 1), row]
        slots.last[i] = see.last[min(batch, see.last.shape[0] - 1), row]
    for i in range(0, PANEL, LANES):
        for d in range(0, width, LANES):
            at, to = slots.scratch[i * width + d :].ctypes.data, queries[d * PANEL + i :].ctypes.data
            transpose(at, width, to, PANEL, np.float32(1))
    for i in range(queries.size if squared else 0):
        squares[i] = (queries[i] * rule.scale) ** 2
    for i in range(queries.size):
        queries[i] *= rule.factor
    if k.small.scale.size:
        fill_panel(queries, slots.small_queries)
        if squared:
            fill_panel(squares, slots.small_squares)


@inlined
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
    width = ((dim - 1) // LANES + 1) * LANES
    memory = Slots(
        aligned(width * PANEL), aligned(width * PANEL), empty_panel(width), empty_panel(width),
        aligned((tiles + LANES) * groups * PANEL), aligned(tiles * PANEL), np.empty(tiles, np.uint8),
        aligned(KEYS * PANEL), aligned(KEYS * PANEL), aligned(KEYS * width), aligned(4 * PANEL).reshape(4, PANEL),
        aligned(PANEL), aligned(LANES * LANES), np.empty(KEYS * PANEL, np.uint8), np.empty(PANEL, np.int64),
        np.empty(PANEL, np.int64),
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
        if share > 1:
            row = (head * count + part * share * PANEL) // see.together
            probability[row] /= np.float32(max(1, (lse[row * see.together : (row + 1) * see.together] > -np.inf).sum()))


@inlined
def _measure_panel(
    q: Matrix, k: Keys, see: Rows, summary: Summary, rule: Rule, head: int, panel: int, slots: Slots,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add one panel's softmax over the tiles to the result."""
    tiles, groups = probability.shape[1], max(1, summary.groups)
    batch = head // see.heads
    kv_head = batch * see.kv_heads + head % see.heads // (see.heads // see.kv_heads)
    _pack_rows(q, head, batch, panel, see, rule, k, summary.groups > 0, slots)
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


@inlined
def _normalise(
    slots: Slots, low: int, high: int, groups: int, sink: np.float32, base: int, start: int, see: Rows,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Softmax over the tiles low .. high of one panel, the rows base + start of all; `sink` is one more logit."""
    state, share = slots.state, slots.share
    totals(slots, low, high, groups, see.rough)
    count, width = min(PANEL, len(see.rows) - start), min(see.together, PANEL)
    for i in range(PANEL):
        total = state[TOTAL, i] + np.float32(2) ** (sink - state[LARGEST, i])
        share[i] = np.float32(1) / total if total > 0 and i < count else np.float32(0)
        if i < count:
            lse[base + start + i] = (state[LARGEST, i] + math.log2(total)) * math.log(2) if total > 0 else -np.inf
    if see.together <= PANEL:  # else the mean is taken once the other panels are there
        for lane in range(0, count, width):
            share[lane : lane + width] /= np.float32(max(1, (share[lane : lane + width] > 0).sum()))
    for tile in range(low, high, LANES):
        _add_lanes(
            slots, tile, min(LANES, high - tile), groups, width, count, (base + start) // see.together, probability
        )


@inlined
def _add_lanes(
    slots: Slots, tile: int, tiles: int, groups: int, width: int, count: int, row: int,
    probability: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add `tiles` masses, LANES at most, of `count` lanes to the result: `width` lanes to a row, from `row` on."""
    block, share = slots.block, slots.share
    for first in range(0, count, LANES):
        masses = slots.mass[tile * groups * PANEL + first :]
        transpose_each(masses.ctypes.data, groups * PANEL, block.ctypes.data, LANES, share[first:].ctypes.data)
        together = min(width, LANES)
        for lane in range(first, min(first + LANES, count), together):
            out, lanes = probability[row + lane // width, tile:], block[(lane - first) * LANES :]
            if tiles == LANES:
                add_rows(lanes.ctypes.data, together, out.ctypes.data)
            else:
                for i in range(together):
                    for t in range(tiles):
                        out[t] += lanes[i * LANES + t]
