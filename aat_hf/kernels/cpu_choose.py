"""Choosing tiles on the CPU, compiled by numba: `aat_hf.tiling.select.select_tiles` without sorting.

The mass at which the dropped tiles use up the tolerance is found by partitions around a pivot (Hoare's selection,
weighted): what lies on one side is settled as a whole.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import entry, jit
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.tiling.masks import NONE

_CELL_WORK = 32  # about as many multiply-adds take as long as one tile


def choose_tiles(
    mass: Tensor,
    forced: Tensor,
    states: Tensor,
    tolerance: Tensor,
    max_kept: float,
    free_mass: Tensor | None,
    units: float,
) -> Tensor:
    """`select_tiles` for float32 tensors on the CPU, bit for bit; masses are counted in `units` of a whole one."""
    batch, heads, query_tiles, _ = mass.shape
    kept = torch.empty(mass.shape, dtype=torch.bool)
    free = torch.zeros(()) if free_mass is None else free_mass
    run(
        choose, mass.numel() * _CELL_WORK, mass.contiguous().numpy(), forced.contiguous().numpy(),
        states.contiguous().numpy(), tolerance.contiguous().numpy(),
        (free.double() * units).expand(batch, heads, query_tiles).contiguous().numpy(), max_kept, np.float32(units),
        kept.numpy(),
    )  # fmt: skip
    return kept


@entry
def choose(
    counter: NDArray[np.int64], mass: NDArray[np.float32], forced: NDArray[np.bool_], states: NDArray[np.uint8],
    tolerance: NDArray[np.float32], free: NDArray[np.float64], max_kept: float, units: np.float32,
    kept: NDArray[np.bool_],
) -> None:  # fmt: skip
    """Take query tiles from the queue until it is empty and write which of their key tiles are kept.

    Args:
        mass, kept: (batch, heads, query_tiles, key_tiles).
        forced, states: (batch or 1, heads or 1, query_tiles, key_tiles).
        tolerance: (batch, heads).
        free: (batch, heads, query_tiles), in units.
    """
    mass, forced, states, tolerance, free, kept = borrowed((mass, forced, states, tolerance, free, kept))
    batch, heads, query_tiles, tiles = mass.shape
    memory = np.empty(tiles, np.float32), np.empty(tiles, np.float32)
    spare, larger = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= batch * heads * query_tiles:
            hold(memory)
            return
        b, h, row = taken // query_tiles // heads, taken // query_tiles % heads, taken % query_tiles
        must = forced[min(b, forced.shape[0] - 1), min(h, forced.shape[1] - 1), row]
        state = states[min(b, states.shape[0] - 1), min(h, states.shape[1] - 1), row]
        masses, keep = mass[b, h, row], kept[b, h, row]
        visible, count, whole = 0, 0, 0.0
        for tile in range(tiles):
            if state[tile] != NONE:
                amount = _amount(masses[tile], units)
                visible += 1
                whole += amount
                spare[count] = amount
                count += not must[tile] and amount > 0
        threshold = _threshold(spare, larger, count, np.float64(tolerance[b, h]) * (whole + free[b, h, row]))
        for tile in range(tiles):
            keep[tile] = (state[tile] != NONE) & (must[tile] | (_amount(masses[tile], units) >= threshold))
        if keep.sum() > max_kept * visible:
            for tile in range(tiles):
                keep[tile] = state[tile] != NONE


@jit
def _amount(mass: np.float32, units: np.float32) -> np.float32:
    """A mass, 1 at most and for NaN, as a whole number of units, rounded up."""
    return np.ceil(max(mass, np.float32(0)) * units) if mass <= 1 else units


@jit
def _threshold(spare: NDArray[np.float32], larger: NDArray[np.float32], count: int, budget: float) -> np.float32:
    """The smallest amount that is kept when all smaller ones, in sum <= `budget`, are dropped; of equal ones all.

    Args:
        spare: the amounts are the first `count`; overwritten.
        larger: of that size, overwritten.
    """
    spent = np.float64(0)
    while count:
        a, b, c = spare[0], spare[count // 2], spare[count - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        low, high, below = 0, 0, np.float64(0)
        for i in range(count):  # without branches: which way an amount goes cannot be predicted
            amount = spare[i]
            spare[low] = amount
            larger[high] = amount
            low += amount < pivot
            high += amount > pivot
            below += amount if amount < pivot else np.float32(0)
        equal = np.float64(pivot) * (count - low - high)
        if spent + below > budget:
            count = low
        elif spent + below + equal > budget:
            return pivot
        else:
            spent += below + equal
            spare, larger, count = larger, spare, high
    return np.float32(np.inf)
