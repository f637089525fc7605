"""Grids of tile masses on the CPU, compiled by numba: blended, and summed over what is left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Bytes, Floats, Numbers, aligned, entry
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_masses import blend_rows, left_out

_CELL_WORK = 8  # about as many multiply-adds take as long as one tile
_ROWS = 16  # of a work item
_TINY = np.finfo(np.float32).tiny


def blended(a: Tensor, b: Tensor, states: Tensor, weight: float) -> Tensor:
    """`aat_hf.tiling.selectors.blend` of float32 grids."""
    out = torch.empty(a.shape)
    grids = (x.contiguous().numpy() for x in (a, b, states))
    run(blend, _CELL_WORK * a.numel(), *grids, np.float32(weight), out.numpy())
    return out


def mean_left_out(mass: Tensor, kept: Tensor, rows: Tensor | None) -> Tensor:
    """`aat_hf.tiling.select.mean_left_out` of float32 masses."""
    heads = mass.shape[:2]
    out = torch.empty(heads)
    rows = torch.arange(mass.shape[2]) if rows is None else rows.contiguous()
    grids = mass.contiguous().flatten(0, 1).numpy(), kept.contiguous().flatten(0, 1).view(torch.uint8).numpy()
    run(sum_left_out, _CELL_WORK * mass.numel(), *grids, rows.numpy(), out.view(-1).numpy())
    return out


@entry
def blend(counter: Numbers, a: Floats, b: Floats, states: Bytes, weight: np.float32, out: Floats) -> None:
    """Take blocks of rows from the queue until it is empty; of `states` all heads may share one grid."""
    a, b, states, out = borrowed((a, b, states, out))
    batch, heads, rows, tiles = a.shape
    blocks, memory = (rows - 1) // _ROWS + 1, aligned(2)
    sums = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= batch * heads * blocks:
            hold(memory)
            return
        i, h, start = taken // blocks // heads, taken // blocks % heads, taken % blocks * _ROWS
        state = states[min(i, states.shape[0] - 1), min(h, states.shape[1] - 1)]
        for row in range(start, min(start + _ROWS, rows)):
            less, more = weight * np.float32(row > 0), weight * np.float32(row + 1 < rows)
            before, after = -tiles * (row > 0), tiles * (row + 1 < rows)
            first, second, mixed = a[i, h, row].ctypes.data, b[i, h, row].ctypes.data, out[i, h, row]
            at = mixed.ctypes.data, sums.ctypes.data
            blend_rows(first, second, before, after, state[row].ctypes.data, tiles, at[0], at[1], less, more)
            mixed *= sums[0] / max(sums[1], _TINY)


@entry
def sum_left_out(counter: Numbers, mass: Floats, kept: Bytes, rows: Numbers, out: Floats) -> None:
    """Take heads from the queue until it is empty: out (heads,) = mean of what mass[i] has outside kept[rows[i]].

    Args:
        mass: (heads, R, key_tiles); kept: (heads, query_tiles, key_tiles).
    """
    mass, kept, rows, out = borrowed((mass, kept, rows, out))
    memory = aligned(1)
    lost = borrowed(memory)
    while True:
        head = simd.take_number(counter.ctypes.data)
        if head >= len(out):
            hold(memory)
            return
        total = np.float32(0)
        for i in range(len(rows)):
            left_out(mass[head, i].ctypes.data, kept[head, rows[i]].ctypes.data, mass.shape[2], lost.ctypes.data)
            total += lost[0]
        out[head] = total / np.float32(len(rows))
