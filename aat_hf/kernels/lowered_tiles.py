"""A tile map and its mask as the kernels take them: compressed rows of exact tiles, the mask inside the cut ones."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels.cpu_matrices import Numbers
from aat_hf.kernels.simd_emit import PANEL
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import EXACT, TileMap

_MASK_ELEMENTS = 1 << 15  # mask positions evaluated at a time: from here on torch would use its threads
_KEPT_BYTES = 1 << 22  # masks of cut tiles that are kept for the next layer


class LoweredTiles(NamedTuple):
    """The exact tiles of a `TileMap` and its mask as tensors; see `cpu_matrices.Grid`."""

    starts: Tensor
    columns: Tensor
    cuts: Tensor
    masks: Tensor


class _CutTiles(NamedTuple):
    """The mask in some cut tiles: `masks` (masks, key_tile, padded query_tile) uint8, `number` the one of each tile.

    Arrays, not tensors: those made in inference mode could not be saved for a later backward pass.
    """

    places: Numbers
    masks: NDArray[np.uint8]
    number: Numbers


_cut_tiles: WeakKeyDictionary[AttentionMask, dict[tuple[int, ...], _CutTiles]] = WeakKeyDictionary()


def lower_tiles(tile_map: TileMap, mask: AttentionMask) -> LoweredTiles:
    """Exact tiles as compressed rows; cut tiles in which the mask is the same share its evaluation."""
    # numpy: a thousand elements here and there are not worth torch's threads
    starts, columns, exact = rows_of(tile_map, EXACT)
    (cut,) = tile_map.cut.numpy()[exact].nonzero()
    _, heads, query_tiles, key_tiles = tile_map.shape
    own_batch, own_heads = (size > 1 for size in tile_map.states.shape[:2])
    row, column = starts.searchsorted(cut, side="right") - 1, columns[cut]
    head = row // query_tiles
    shared = head // heads * own_batch * heads + head % heads * own_heads
    places, index = np.unique((shared * query_tiles + row % query_tiles) * key_tiles + column, return_inverse=True)
    found = _mask_tiles(places, tile_map, mask)
    cuts = np.full_like(columns, -1)
    cuts[cut] = found.number[index]
    return LoweredTiles(*map(torch.from_numpy, (starts, columns, cuts, found.masks)))


def rows_of(tile_map: TileMap, level: int) -> tuple[Numbers, Numbers, NDArray[np.bool_]]:
    """`row_start` and `columns` of the tiles of one level, and which of all stored tiles they are."""
    chosen = tile_map.levels.numpy() == level
    if chosen.all():
        return tile_map.row_start.numpy(), tile_map.columns.numpy(), chosen
    return np.concatenate([[0], chosen.cumsum()])[tile_map.row_start.numpy()], tile_map.columns.numpy()[chosen], chosen


def _mask_tiles(places: Numbers, tile_map: TileMap, mask: AttentionMask) -> _CutTiles:
    """The mask in the given tiles of the dense map; kept, for the layers of a model mostly cut the same tiles."""
    known, grid = _cut_tiles.setdefault(mask, {}), (*tile_map.shape[1:], tile_map.query_tile, tile_map.key_tile)
    found = known.get(grid)  # looked up once: another thread may put other places there
    if found is not None and np.array_equal(found.places, places):
        return found
    found = _CutTiles(places, *_evaluated(torch.from_numpy(places), tile_map, mask))
    if found.masks.size <= _KEPT_BYTES:
        known[grid] = found
    return found


def _evaluated(places: Tensor, tile_map: TileMap, mask: AttentionMask) -> tuple[NDArray[np.uint8], Numbers]:
    """`masks` and `number` of `_CutTiles`."""
    _, heads, query_tiles, key_tiles = tile_map.shape
    width = -(-tile_map.query_tile // PANEL) * PANEL
    within_tile = torch.arange(width).clamp(max=tile_map.query_tile - 1)  # lanes past the end repeat the last query
    head, tile = places // key_tiles // query_tiles, places // key_tiles % query_tiles
    query = (tile[:, None] * tile_map.query_tile + within_tile).clamp(max=mask.queries - 1)
    start = places % key_tiles * tile_map.key_tile
    first, number = mask.alike(head // heads, query, start, tile_map.key_tile)
    head, query, start = head[first, None, None], query[first, None], start[first, None, None]
    masks = torch.empty(len(first), tile_map.key_tile, width, dtype=torch.bool)
    for part in torch.arange(len(first)).split(max(1, _MASK_ELEMENTS // (tile_map.key_tile * width))):
        key = (start[part] + torch.arange(tile_map.key_tile)[:, None]).clamp(max=mask.keys - 1)
        masks[part] = mask.allowed(head[part] // heads, head[part] % heads, query[part], key)
    return masks.view(torch.uint8).numpy(), number.numpy()
