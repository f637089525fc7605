"""Loop of attention with one query, compiled by numba: which tiles are worth reading, by the masses of all."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Bytes, Floats, Numbers, entry, jit

_BINS = 1 << 11  # values of `_bin`


@entry
def choose(
    counter: Numbers, mass: Floats, top: Floats, sinks: Floats, tiles: int, tolerances: NDArray[np.float64],
    max_kept: float, rescale: Floats, kept: Bytes, sums: NDArray[np.float64],
) -> None:  # fmt: skip
    """Take heads from the queue until it is empty: the tiles without which at most its tolerance is lost.

    The order in which tiles are dropped is that of their masses, up to an eighth of a power of two.

    Args:
        mass, top: what `score` or `predict` left; tiles: key tiles of a head.
        sinks: (heads,) base-2 logits of a virtual key, or empty.
        tolerances: (batch * heads,) share of the head's mass that may be lost.
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
        for b in range(top.shape[1]):
            for tile in range(b * block, min((b + 1) * block, tiles)):
                mass[head, tile] *= rescale[head, b]
                if mass[head, tile] > 0:
                    whole += mass[head, tile]
                    alive += 1
                    bins[_bin(mass[head], tile)] += mass[head, tile]
        count, held = _drop(mass[head, :tiles], bins, tolerances[head] * (whole + free), kept[head])
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
