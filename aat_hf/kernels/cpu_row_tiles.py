"""One panel of query rows against key tiles, exact or predicted, compiled by numba: base-2 log masses of the tiles.

`PANEL` rows of one head sit in vector lanes, see `cpu_matrices`. Each key tile has as many slots as it has summaries,
each a panel of log masses: a predicted tile fills them all, an exact one puts its maximum into the first and keeps
its total as a weight.
"""

from __future__ import annotations

import math

import numpy as np

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_bytes import BytePanel, ByteRows
from aat_hf.kernels.cpu_matrices import Floats, Rule, inlined, jit, load
from aat_hf.kernels.cpu_row_data import BLOCK, KEYS, LARGEST, TOTAL, UNREAD, Keys, Rows, Slots, Summary, address
from aat_hf.kernels.simd_bytes import scores_bytes
from aat_hf.kernels.simd_emit import LOWEST, MASKED, PANEL
from aat_hf.kernels.simd_rough import relative, relative_rough, tile_totals, tile_totals_rough
from aat_hf.kernels.simd_rows import cumulants, cumulants_capped, hide_outside, weigh_tiles


@inlined
def exact_tiles(
    k: Keys, k_first: int, see: Rows, batch: int, tile: int, count: int, groups: int, whole: bool, rule: Rule,
    slots: Slots,
) -> None:  # fmt: skip
    """Maximum and total of `count` tiles' exact scores: one tile, or several with `KEYS` keys at most together."""
    here, top = address(slots.state, BLOCK), slots.state[LARGEST]
    first, end = tile * see.key_tile, min((tile + count) * see.key_tile, see.keys)
    mass, total = address(slots.mass, tile * groups), address(slots.weight, tile)
    slots.weighted[tile : tile + count] = 1
    slots.state[BLOCK] = LOWEST
    if groups > 1 or end - first > KEYS:
        slots.mass[tile * groups * PANEL : (tile + count) * groups * PANEL] = LOWEST
    if end - first <= KEYS:  # tiles of one block share their maximum
        _score(k, k_first, see, batch, first, end - first, whole, rule, slots)
        full = (end - first) // see.key_tile
        if full:
            _totals(slots.scores.ctypes.data, see.key_tile, full, here, mass, groups * PANEL, total, see.rough)
        if first + full * see.key_tile < end:  # a shorter last tile
            rest, at = end - first - full * see.key_tile, address(slots.scores, full * see.key_tile)
            _totals(at, rest, 1, here, mass + full * groups * PANEL * 4, 0, total + full * PANEL * 4, see.rough)
    else:
        slots.weight[tile * PANEL : (tile + 1) * PANEL] = 0
        for key in range(first, end, KEYS):
            keys = min(KEYS, end - key)
            _score(k, k_first, see, batch, key, keys, whole, rule, slots)
            simd.soften(slots.scores.ctypes.data, keys, mass, here, total, address(slots.state, UNREAD))
    for i in range(PANEL):
        top[i] = max(top[i], slots.state[BLOCK, i])


@jit
def _totals(scores: int, rows: int, tiles: int, top: int, mass: int, step: int, total: int, rough: bool) -> None:
    """Maxima and totals of the scores of tiles of one size."""
    if rough:
        tile_totals_rough(scores, rows, tiles, top, mass, step, total)
    else:
        tile_totals(scores, rows, tiles, top, mass, step, total)


@inlined
def _score(
    k: Keys, k_first: int, see: Rows, batch: int, key: int, keys: int, whole: bool, rule: Rule, slots: Slots
) -> None:
    """Base-2 scores of the `keys` keys from `key` on, `KEYS` at most; raises the maximum in `slots.state`."""
    here, unused, scores = address(slots.state, BLOCK), address(slots.state, UNREAD), slots.scores.ctypes.data
    final = whole and not rule.capped
    if k.small.scale.size:
        _small_products(k.small, k_first + key, keys, slots.small_queries, scores, here if final else unused)
    else:
        rows = load(k.wide, k_first + key, keys, slots.scratch)
        _products(rows.ctypes.data, rows.shape[1], keys, slots.queries, scores, here if final else unused)
    if rule.capped:
        simd.cap_scores(scores, keys, here if whole else unused, rule.inner, rule.outer)
    if not whole:
        _hide(see, batch, key, keys, slots, scores, here)


@jit  # one copy of the micro-kernel serves keys, means and variances
def _products(rows: int, dim: int, count: int, panel: Floats, out: int, top: int) -> None:
    """Products of `count` rows of `dim` floats, an address, with a panel; raises the maximum at `top`."""
    simd.scores_top(rows, dim, count, panel.ctypes.data, PANEL, out, PANEL, dim, top)


@jit
def _small_products(rows: ByteRows, first: int, count: int, panel: BytePanel, out: int, top: int) -> None:
    """`_products` of rounded rows with a rounded panel."""
    width = rows.bytes.shape[1]
    at, scale = rows.bytes.ctypes.data + first * width, rows.scale.ctypes.data + first * 4
    q_at, q_scale, shift = panel.words.ctypes.data, panel.scale.ctypes.data, panel.shift.ctypes.data
    scores_bytes(at, count, width // 4, scale, q_at, q_scale, shift, out, top)


@jit
def _hide(see: Rows, batch: int, key: int, keys: int, slots: Slots, scores: int, top: int) -> None:
    """Masks the scores of the `keys` keys from `key` on that a row does not see; raises the maximum at `top`."""
    if see.valid.size == 0:
        hide_outside(scores, keys, key, slots.first.ctypes.data, slots.last.ctypes.data, top, MASKED)
        return
    valid = see.valid[min(batch, see.valid.shape[0] - 1)]
    for j in range(keys):
        exists = valid[key + j + 1] > valid[key + j]
        for i in range(PANEL):
            slots.allowed[j * PANEL + i] = exists and slots.first[i] <= key + j < slots.last[i]
    simd.mask_panel(scores, PANEL, keys, slots.allowed.ctypes.data, PANEL, top, MASKED)


@inlined
def predict_tiles(
    summary: Summary, see: Rows, batch: int, base: int, tile: int, count: int, whole: bool, rule: Rule, slots: Slots
) -> None:
    """Base-2 log masses of every summary of `count` tiles; `base` is the head's first summary."""
    one, log2e = np.float32(1), np.float32(1 / math.log(2))
    top, spreads = address(slots.state, LARGEST if whole else UNREAD), slots.spreads.ctypes.data
    slots.weighted[tile : tile + count] = not whole
    for place in range(tile * summary.groups, (tile + count) * summary.groups, KEYS):
        groups = min(KEYS, (tile + count) * summary.groups - place)
        at = address(slots.mass, place)
        _moment_products(summary, base + place, groups, slots, at, spreads)
        critical, size = summary.critical[place:].ctypes.data, summary.log_size[place:].ctypes.data
        if rule.capped:
            inner, outer = one / summary.softcap, summary.softcap * log2e
            cumulants_capped(at, spreads, groups, critical, size, top, rule.scale, one, inner, outer)
        else:
            cumulants(at, spreads, groups, critical, size, top, one, log2e, one, one)
    if not whole:
        for cut in range(tile, tile + count):
            _weigh(see, batch, cut, summary.groups, slots)


@inlined
def _moment_products(summary: Summary, first: int, count: int, slots: Slots, means: int, spreads: int) -> None:
    """Products of the means and of the variances of `count` groups from `first` on."""
    unread = address(slots.state, UNREAD)
    if summary.small_mean.scale.size:
        _small_products(summary.small_mean, first, count, slots.small_queries, means, unread)
        _small_products(summary.small_variance, first, count, slots.small_squares, spreads, unread)
        return
    dim = summary.mean.shape[1]
    mean, variance = summary.mean.ctypes.data + first * dim * 4, summary.variance.ctypes.data + first * dim * 4
    _products(mean, dim, count, slots.queries, means, unread)
    _products(variance, dim, count, slots.squares, spreads, unread)


@jit
def _weigh(see: Rows, batch: int, tile: int, groups: int, slots: Slots) -> None:
    """Weigh a predicted tile by the share of its keys that each row sees."""
    begin, end = tile * see.key_tile, min(tile * see.key_tile + see.key_tile, see.keys)
    for i in range(PANEL):
        low, high = max(slots.first[i], begin), min(slots.last[i], end)
        seen = max(high - low, 0)
        if see.valid.size and seen:
            before = see.valid[min(batch, see.valid.shape[0] - 1)]
            seen = before[high] - before[low]
        slots.weight[tile * PANEL + i] = np.float32(seen / (end - begin))
        for place in range(tile * groups * PANEL + i, (tile + 1) * groups * PANEL, PANEL):
            if seen == 0:
                slots.mass[place] = LOWEST
            slots.state[LARGEST, i] = max(slots.state[LARGEST, i], slots.mass[place])


@inlined
def totals(slots: Slots, low: int, high: int, groups: int, rough: bool) -> None:
    """From log masses to masses relative to the row's largest, a tile's in its first slot, and their totals."""
    mass, state = slots.mass, slots.state
    top, total, unread = address(state, LARGEST), address(state, TOTAL), address(state, UNREAD)
    state[TOTAL] = 0
    tile = low
    while tile < high:
        after, weighted = tile + 1, slots.weighted[tile]
        while after < high and slots.weighted[after] == weighted:
            after += 1
        at, rows, sums = address(mass, tile * groups), (after - tile) * groups, unread if weighted else total
        if rough:
            relative_rough(at, rows, top, sums)
        else:
            relative(at, rows, top, sums)
        if groups > 1:
            for t in range(tile * groups, after * groups, groups):
                for slot in range(t + 1, t + groups):
                    for i in range(PANEL):
                        mass[t * PANEL + i] += mass[slot * PANEL + i]
        if weighted:
            weigh_tiles(address(mass, tile * groups), groups * PANEL, after - tile, address(slots.weight, tile), total)
        tile = after


@inlined
def whole_tiles(see: Rows, slots: Slots) -> tuple[int, int]:
    """First and one past the last tile that every row of the panel sees whole, if all its keys are valid."""
    first, last = slots.first.max(), slots.last.min()
    return (first - 1) // see.key_tile + 1, (last - 1) // see.key_tile + 1 if last >= see.keys else last // see.key_tile


@inlined
def is_whole(see: Rows, batch: int, tile: int, inside: tuple[int, int]) -> bool:
    """Whether every row of the panel sees every key of the tile; `inside` is of `whole_tiles`."""
    if not inside[0] <= tile < inside[1]:
        return False
    if see.valid.size == 0:
        return True
    before, begin = see.valid[min(batch, see.valid.shape[0] - 1)], tile * see.key_tile
    end = min(begin + see.key_tile, see.keys)
    return bool(before[end] - before[begin] == end - begin)
