"""Loop of the row measurement, compiled by numba: tile probabilities of chosen query rows, exact or predicted.

`PANEL` rows of one head sit in vector lanes, see `cpu_matrices`. Each key tile has as many slots as it has summaries,
each a panel of base-2 log masses: a predicted tile fills them all, an exact one puts its maximum into the first and
keeps its total as a weight. The softmax over the slots follows when all are there.
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
        together: so many of them share a row of the result, their mean; divides `PANEL` or is a multiple of it.
        sinks: (heads,) float32, base-2 logit of one more key of each row that no tile holds; (0,) for none.
        first, last: (batch or 1, queries) int64, row i sees first[i] <= j < last[i].
        valid: (batch or 1, keys + 1) int64, number of valid keys before each; (0, 0) when all are.
        heads, kv_heads: of q and k.
        queries, keys, key_tile: lengths.
    """

    rows: NDArray[np.int64]
    together: int
    sinks: NDArray[np.float32]
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


class Slots(NamedTuple):
    """What one thread knows of its panel's tiles.

    Attributes:
        mass: (tiles * groups * PANEL,) base-2 log masses, later masses relative to the row's largest.
        weight: (tiles * PANEL,) factor of a tile's mass, where `weighted`.
        weighted: (tiles,) uint8.
        scores, spreads, scratch: of `KEYS` keys or groups.
        state: (4, PANEL): maximum, total, and two to spare.
        allowed: (KEYS * PANEL,) uint8, the mask of a block of keys.
        first, last: (PANEL,) int64, each row sees the keys first <= j < last.
    """

    mass: NDArray[np.float32]
    weight: NDArray[np.float32]
    weighted: NDArray[np.uint8]
    scores: NDArray[np.float32]
    spreads: NDArray[np.float32]
    scratch: NDArray[np.float32]
    state: NDArray[np.float32]
    allowed: NDArray[np.uint8]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


@jit
def _address(x: NDArray[np.float32], row: int) -> int:
    """Address of panel number `row`."""
    return x.ctypes.data + row * PANEL * 4


@jit
def _exact_tiles(
    k: Matrix, k_first: int, see: Rows, batch: int, tile: int, count: int, groups: int, whole: bool, rule: Rule,
    q_at: int, slots: Slots, dim: int,
) -> None:  # fmt: skip
    """Maximum and total of `count` tiles' exact scores: one tile, or several with `KEYS` keys at most together."""
    here, unused = _address(slots.state, 2), _address(slots.state, 3)
    end = min((tile + count) * see.key_tile, see.keys)
    slots.mass[tile * groups * PANEL : (tile + count) * groups * PANEL] = MASKED
    for t in range(tile, tile + count):
        slots.mass[t * groups * PANEL : (t * groups + 1) * PANEL] = LOWEST
    slots.weight[tile * PANEL : (tile + count) * PANEL] = 0
    slots.weighted[tile : tile + count] = 1
    for key in range(tile * see.key_tile, end, KEYS):
        keys = min(KEYS, end - key)
        k_at = load(k, k_first + key, keys, slots.scratch).ctypes.data
        slots.state[2] = slots.mass[tile * groups * PANEL : (tile * groups + 1) * PANEL]
        if whole and not rule.capped:
            simd.scores_top(k_at, dim, keys, q_at, PANEL, slots.scores.ctypes.data, PANEL, dim, here)
        else:
            simd.scores(k_at, dim, keys, q_at, PANEL, slots.scores.ctypes.data, PANEL, dim, 0)
            if rule.capped:
                simd.cap_scores(slots.scores.ctypes.data, keys, here if whole else unused, rule.inner, rule.outer)
            if not whole:
                _allow(see, batch, key, keys, slots)
                allowed = slots.allowed.ctypes.data
                simd.mask_panel(slots.scores.ctypes.data, PANEL, keys, allowed, PANEL, here, MASKED)
        for t in range(count):
            at = t * see.key_tile
            rows = keys if count == 1 else min(see.key_tile, keys - at)
            top, total = _address(slots.mass, (tile + t) * groups), _address(slots.weight, tile + t)
            simd.soften(_address(slots.scores, at), rows, top, here, total, unused)


@jit
def _allow(see: Rows, batch: int, key: int, keys: int, slots: Slots) -> None:
    """Which of the `keys` keys from `key` on each row sees."""
    valid = see.valid[min(batch, see.valid.shape[0] - 1)] if see.valid.size else see.valid.reshape(-1)
    for j in range(keys):
        exists = valid.size == 0 or valid[key + j + 1] > valid[key + j]
        for i in range(PANEL):
            slots.allowed[j * PANEL + i] = exists and slots.first[i] <= key + j < slots.last[i]


@jit
def _predict_tiles(
    summary: Summary, base: int, tile: int, count: int, rule: Rule, q_at: int, square_at: int, slots: Slots, dim: int
) -> None:
    """Base-2 log masses of every summary of `count` tiles; `base` is the head's first summary."""
    one, log2e = np.float32(1), np.float32(1 / math.log(2))
    unused, spreads = _address(slots.state, 3), slots.spreads.ctypes.data
    slots.weighted[tile : tile + count] = 0
    for place in range(tile * summary.groups, (tile + count) * summary.groups, KEYS):
        groups = min(KEYS, (tile + count) * summary.groups - place)
        at = _address(slots.mass, place)
        mean, variance = summary.mean[base + place :].ctypes.data, summary.variance[base + place :].ctypes.data
        simd.scores(mean, dim, groups, q_at, PANEL, at, PANEL, dim, 0)
        simd.scores(variance, dim, groups, square_at, PANEL, spreads, PANEL, dim, 0)
        critical, size = summary.critical[place:].ctypes.data, summary.log_size[place:].ctypes.data
        if rule.capped:
            inner, outer = one / summary.softcap, summary.softcap * log2e
            cumulants_capped(at, spreads, groups, critical, size, unused, rule.scale, one, inner, outer)
        else:
            cumulants(at, spreads, groups, critical, size, unused, one, log2e, one, one)


@jit
def _weigh_cut_tile(see: Rows, batch: int, tile: int, groups: int, slots: Slots) -> None:
    """Weigh a predicted tile by the share of its keys that each row sees."""
    begin, end = tile * see.key_tile, min(tile * see.key_tile + see.key_tile, see.keys)
    slots.weighted[tile] = 1
    for i in range(PANEL):
        low, high = max(slots.first[i], begin), min(slots.last[i], end)
        seen = max(high - low, 0)
        if see.valid.size and seen:
            before = see.valid[min(batch, see.valid.shape[0] - 1)]
            seen = before[high] - before[low]
        slots.weight[tile * PANEL + i] = np.float32(seen / (end - begin))
        if seen == 0:
            for g in range(groups):
                slots.mass[(tile * groups + g) * PANEL + i] = LOWEST


@jit
def _whole(see: Rows, batch: int, tile: int, inside: tuple[int, int]) -> bool:
    """Whether every row of the panel sees every key of the tile; all see the keys inside[0] <= j < inside[1]."""
    begin, end = tile * see.key_tile, min(tile * see.key_tile + see.key_tile, see.keys)
    if begin < inside[0] or end > inside[1]:
        return False
    if see.valid.size == 0:
        return True
    before = see.valid[min(batch, see.valid.shape[0] - 1)]
    return bool(before[end] - before[begin] == end - begin)


@jit
def _pack_rows(
    q: Matrix, head: int, batch: int, panel: int, see: Rows, rule: Rule, queries: NDArray[np.float32],
    squares: NDArray[np.float32], slots: Slots,
) -> None:  # fmt: skip
    """The panel's rows times the factor and their squares, transposed, and the keys that they see."""
    for i in range(PANEL):
        row = see.rows[min(panel * PANEL + i, len(see.rows) - 1)]
        values = load(q, head * see.queries + row, 1, slots.scratch)
        for d in range(values.shape[1]):
            value = values[0, d]
            queries[d * PANEL + i] = value * rule.factor
            squares[d * PANEL + i] = (value * rule.scale) ** 2
        slots.first[i] = see.first[min(batch, see.first.shape[0] - 1), row]
        slots.last[i] = see.last[min(batch, see.last.shape[0] - 1), row]


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
    counter: NDArray[np.int64], q: Matrix, k: Matrix, see: Rows, summary: Summary, rule: Rule,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Take groups of rows from the queue until it is empty: whole rows of the result, a panel at least.

    Args:
        probability: (batch * heads * R / together, key_tiles), zeros; becomes the softmax summed over the tiles, mean
            of the rows that see a key.
        lse: (batch * heads * R,), natural; -inf for rows that see no key.
    """
    dim, count, tiles = max(q.wide.shape[1], q.bits.shape[1]), len(see.rows), probability.shape[1]
    panels, groups = (count - 1) // PANEL + 1, max(1, summary.groups)
    share = max(1, see.together // PANEL)  # panels of a row of the result
    shares = (panels - 1) // share + 1
    queries, squares = aligned(dim * PANEL), aligned(dim * PANEL)
    slots = Slots(
        aligned(tiles * groups * PANEL), aligned(tiles * PANEL), np.empty(tiles, np.uint8), aligned(KEYS * PANEL),
        aligned(KEYS * PANEL), aligned(KEYS * dim), aligned(4 * PANEL).reshape(4, PANEL),
        np.empty(KEYS * PANEL, np.uint8), np.empty(PANEL, np.int64), np.empty(PANEL, np.int64),
    )  # fmt: skip
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= lse.size // count * shares:
            return
        part = shares - 1 - taken % shares  # a causal mask's longest rows first
        head = taken // shares
        for panel in range(part * share, min(part * share + share, panels)):
            _measure_panel(q, k, see, summary, rule, head, panel, queries, squares, slots, probability, lse)
        first, last = part * share * PANEL, min((part + 1) * share * PANEL, count)
        for row in range(first // see.together, (last - 1) // see.together + 1):
            alive = 0
            for i in range(row * see.together, (row + 1) * see.together):
                alive += lse[head * count + i] > -np.inf
            if alive > 1:
                probability[head * (count // see.together) + row] /= np.float32(alive)


@jit
def _measure_panel(
    q: Matrix, k: Matrix, see: Rows, summary: Summary, rule: Rule, head: int, panel: int, queries: NDArray[np.float32],
    squares: NDArray[np.float32], slots: Slots, probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add one panel's softmax over the tiles to the result."""
    dim, tiles, groups = len(queries) // PANEL, probability.shape[1], max(1, summary.groups)
    q_at, square_at = queries.ctypes.data, squares.ctypes.data
    batch = head // see.heads
    kv_head = batch * see.kv_heads + head % see.heads // (see.heads // see.kv_heads)
    _pack_rows(q, head, batch, panel, see, rule, queries, squares, slots)
    low, high = slots.first.min() // see.key_tile, (slots.last.max() - 1) // see.key_tile + 1
    inside = slots.first.max(), slots.last.min()
    near, far, sink = low, high, high
    if summary.groups:
        near, far = _band(summary, see, batch, panel)
        sink = summary.sink
    tile = low
    while tile < high:
        exact, whole, after = tile < sink or near <= tile < far, _whole(see, batch, tile, inside), tile + 1
        most = tile + (max(1, KEYS // see.key_tile) if exact else tiles)
        while (
            whole and after < min(high, most) and exact == (after < sink or near <= after < far)
            and _whole(see, batch, after, inside)
        ):  # fmt: skip
            after += 1
        if exact:
            _exact_tiles(k, kv_head * see.keys, see, batch, tile, after - tile, groups, whole, rule, q_at, slots, dim)
        else:
            _predict_tiles(summary, kv_head * tiles * groups, tile, after - tile, rule, q_at, square_at, slots, dim)
            if not whole:
                _weigh_cut_tile(see, batch, tile, groups, slots)
        tile = after
    logit = see.sinks[head % see.heads] if see.sinks.size else np.float32(-np.inf)
    _normalise(slots, low, high, groups, logit, head * len(see.rows), panel * PANEL, see, probability, lse)


@jit
def _normalise(
    slots: Slots, low: int, high: int, groups: int, sink: np.float32, base: int, start: int, see: Rows,
    probability: NDArray[np.float32], lse: NDArray[np.float32],
) -> None:  # fmt: skip
    """Softmax over the tiles low .. high of one panel, the rows base + start of all; `sink` is one more logit."""
    mass, state = slots.mass, slots.state
    state[0], state[1], state[2] = LOWEST, 0, max(LOWEST, sink)
    for slot in range(low * groups, high * groups):
        for i in range(PANEL):
            state[2, i] = max(state[2, i], mass[slot * PANEL + i])
    if high > low:
        place, here, unused = _address(mass, low * groups), _address(state, 2), _address(state, 3)
        simd.soften(place, (high - low) * groups, _address(state, 0), here, _address(state, 1), unused)
    state[1] = 0
    for tile in range(low, high):
        at = tile * groups * PANEL  # the first slot takes the sum of all
        for slot in range(1, groups):
            for i in range(PANEL):
                mass[at + i] += mass[at + slot * PANEL + i]
        if slots.weighted[tile]:
            for i in range(PANEL):
                mass[at + i] *= slots.weight[tile * PANEL + i]
        for i in range(PANEL):
            state[1, i] += mass[at + i]
    for i in range(PANEL):
        total = state[1, i] + np.float32(2) ** (sink - state[2, i])
        live = total > 0 and start + i < len(see.rows)
        if start + i < len(see.rows):
            lse[base + start + i] = (state[2, i] + math.log2(total)) * math.log(2) if live else -np.inf
        state[3, i] = np.float32(1) / total if live else np.float32(0)
    width = min(see.together, PANEL)
    for lane in range(0, min(PANEL, len(see.rows) - start), width):
        row = (base + start + lane) // see.together
        for tile in range(low, high):
            part = np.float32(0)
            for i in range(lane, lane + width):
                part += mass[tile * groups * PANEL + i] * state[3, i]
            probability[row, tile] += part
