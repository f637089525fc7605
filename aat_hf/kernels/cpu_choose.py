"""Choosing tiles on the CPU, compiled by numba: `aat_hf.tiling.select.select_tiles` without sorting.

The mass at which the dropped tiles use up the tolerance is found by bisection.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import aligned, entry, jit
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_choose import amounts, below, keep
from aat_hf.kernels.simd_emit import LANES

_CELL_WORK = 8  # about as many multiply-adds take as long as one tile


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
    memory = aligned(tiles + LANES), np.empty(5, np.float64)
    amount, sums = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= batch * heads * query_tiles:
            hold(memory)
            return
        b, h, row = taken // query_tiles // heads, taken // query_tiles % heads, taken % query_tiles
        must = forced[min(b, forced.shape[0] - 1), min(h, forced.shape[1] - 1), row].ctypes.data
        state = states[min(b, states.shape[0] - 1), min(h, states.shape[1] - 1), row].ctypes.data
        at, out, found = amount.ctypes.data, kept[b, h, row].ctypes.data, sums.ctypes.data
        amounts(mass[b, h, row].ctypes.data, must, state, tiles, at, found, units)
        visible, budget = sums[1], np.float64(tolerance[b, h]) * (sums[0] + free[b, h, row])
        bar = np.float32(np.inf)
        if sums[2] > budget:
            bar = _least_kept(amount[: int(sums[4])], budget, np.float32(sums[3]), sums)
        keep(at, must, state, tiles, out, found, bar)
        if sums[0] > max_kept * visible:
            keep(at, must, state, tiles, out, found, np.float32(0))


@jit
def _least_kept(
    amount: NDArray[np.float32], budget: float, greatest: np.float32, sums: NDArray[np.float64]
) -> np.float32:
    """The smallest amount that is kept when all smaller ones, in sum <= `budget`, are dropped; of equal ones all.

    Bisection: the sum of all amounts <= low is within the budget, that of those <= high, one of them, is not.

    Args:
        amount: whole vectors, 0 for those that do not count.
        greatest: of the amounts, whose sum is above the budget.
        sums: (3,), overwritten.
    """
    half, high = np.float32(0.5), greatest
    low = max(half, half * np.float32(budget / amount.size))  # if none were larger, all would be within the budget
    bar = min(np.sqrt(low * high), np.float32(budget))
    while True:
        below(amount.ctypes.data, amount.size, sums.ctypes.data, bar)
        if sums[0] > budget:
            high = np.float32(sums[1])
            bar = _between(low, high)
        elif sums[2] >= high:
            return high
        else:
            low = bar
            bar = max(_between(low, high), np.float32(sums[2]))


@jit
def _between(low: np.float32, high: np.float32) -> np.float32:
    """About the geometric mean, and less than `high`."""
    return np.sqrt(low * high) * np.float32(1 - 2.0**-23)
