"""Compressing a dense tile map on the CPU, compiled by numba: the arrays of `aat_hf.tiling.tile_map.TileMap`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Bytes, Numbers, entry, jit
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed
from aat_hf.tiling.masks import NONE, PARTIAL

_CELL_WORK = 8  # about as many multiply-adds take as long as one tile
_ROWS = 16  # of a work item


def compressed(levels: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`row_start`, `columns`, `levels` and `cut` of the tiles with a level above 0 that the mask allows."""
    batch, heads, rows, _ = levels.shape
    grids, work = (levels.contiguous().numpy(), states.contiguous().numpy()), _CELL_WORK * levels.numel()
    row_start = torch.zeros(batch * heads * rows + 1, dtype=torch.long)
    run(count_tiles, work, *grids, row_start[1:].numpy())
    torch.cumsum(row_start, 0, out=row_start)
    columns = torch.empty(int(row_start[-1]), dtype=torch.long)
    stored, cut = torch.empty(len(columns), dtype=torch.uint8), torch.empty(len(columns), dtype=torch.bool)
    run(list_tiles, work, *grids, row_start.numpy(), columns.numpy(), stored.numpy(), cut.numpy())
    return row_start, columns, stored, cut


@entry
def count_tiles(counter: Numbers, levels: Bytes, states: Bytes, count: Numbers) -> None:
    """Take blocks of rows from the queue until it is empty and count their tiles.

    Args:
        levels: (batch, heads, query_tiles, key_tiles); states: (batch or 1, heads or 1, query_tiles, key_tiles).
        count: (batch * heads * query_tiles,).
    """
    levels, states, count = borrowed((levels, states, count))
    rows, tiles = levels.shape[2:]
    while True:
        head, start = _next_rows(counter, levels)
        if start < 0:
            return
        level, state = _of_head(levels, states, head)
        for row in range(start, min(start + _ROWS, rows)):
            found = np.int32(0)
            for tile in range(tiles):
                found += np.int32((level[row, tile] != 0) & (state[row, tile] != NONE))
            count[head * rows + row] = found


@entry
def list_tiles(
    counter: Numbers, levels: Bytes, states: Bytes, row_start: Numbers, columns: Numbers, stored: Bytes,
    cut: NDArray[np.bool_],
) -> None:  # fmt: skip
    """Take blocks of rows from the queue until it is empty and write their tiles."""
    levels, states, row_start, columns, stored, cut = borrowed((levels, states, row_start, columns, stored, cut))
    rows = levels.shape[2]
    while True:
        head, start = _next_rows(counter, levels)
        if start < 0:
            return
        level, state = _of_head(levels, states, head)
        for row in range(start, min(start + _ROWS, rows)):
            place, end, tile = row_start[head * rows + row], row_start[head * rows + row + 1], 0
            while place < end:
                if (level[row, tile] != 0) & (state[row, tile] != NONE):
                    columns[place], stored[place], cut[place] = tile, level[row, tile], state[row, tile] == PARTIAL
                    place += 1
                tile += 1


@jit
def _next_rows(counter: Numbers, levels: Bytes) -> tuple[int, int]:
    """A head, counted through the batch, and the first of a block of its rows; (0, -1): there are no more."""
    batch, heads, rows, _ = levels.shape
    blocks = (rows - 1) // _ROWS + 1
    taken = simd.take_number(counter.ctypes.data)
    return (taken // blocks, taken % blocks * _ROWS) if taken < batch * heads * blocks else (0, -1)


@jit
def _of_head(levels: Bytes, states: Bytes, head: int) -> tuple[Bytes, Bytes]:
    """Levels and states of one head: (query_tiles, key_tiles)."""
    b, h = head // levels.shape[1], head % levels.shape[1]
    return levels[b, h], states[min(b, states.shape[0] - 1), min(h, states.shape[1] - 1)]
