"""The tile map of a call: estimate, select, repair, for a few heads at a time so that grids of masses stay small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.patterns import MassCells, mass_cells
from aat_hf.tiling.layout import forced_tiles
from aat_hf.tiling.masks import NONE
from aat_hf.tiling.repair import select_and_repair
from aat_hf.tiling.select import Scene, mean_left_out
from aat_hf.tiling.selectors import get_selector
from aat_hf.tiling.tile_map import COARSE, EXACT, TileMap

_GROUP_BYTES = {"cpu": 12 << 20}  # of the heads planned together
_MANY_BYTES = 1 << 30  # elsewhere: few launches
_CELL_BYTES, _KEY_BYTES = 12, 2.25  # of a tile pair: three grids of masses; of a key's coordinate: rounded, and moments


class Plan(NamedTuple):
    """What is to be computed.

    Attributes:
        tile_map: the tiles; None when nothing could be dropped.
        expected: (batch, heads) infidelity by the selector's estimate.
        cells: the estimated masses as `patterns.classify` sees them, where asked for.
    """

    tile_map: TileMap | None
    expected: Tensor
    cells: MassCells | None = None


@torch.no_grad()
def plan(scene: Scene, with_cells: bool = False) -> Plan:
    """The tile map of a call.

    Heads that share keys are planned together, and as many such groups as keep a grid of masses small.
    """
    config = scene.config
    sizes = config.query_tile, config.key_tile, config.local_tiles, config.sink_tiles, config.dense_prefix
    forced, all_of_them = scene.mask.known(("forced", *sizes), lambda: _forced(scene))
    if all_of_them:
        return Plan(None, torch.zeros(scene.q.shape[:2], device=scene.q.device))
    planned = [_planned(part, forced, with_cells) for part in _parts(scene)]
    levels, expected, cells = zip(*planned, strict=True)
    tile_map = TileMap.from_dense(torch.cat(levels, 1), scene.states, config.query_tile, config.key_tile)
    together = MassCells(*(torch.cat(part, 1) for part in zip(*cells, strict=True))) if with_cells else None
    return Plan(tile_map, torch.cat(expected, 1), together)


def _forced(scene: Scene) -> tuple[Tensor, bool]:
    """The forced tiles, and whether they are all there are."""
    forced = forced_tiles(scene.mask, scene.states, scene.config)
    return forced, bool((forced == (scene.states != NONE)).all())


def _planned(scene: Scene, forced: Tensor, with_cells: bool) -> tuple[Tensor, Tensor, MassCells | None]:
    """Levels (batch, heads, query_tiles, key_tiles) uint8, expected infidelity (batch, heads), and cells if wanted."""
    config = scene.config
    mass = get_selector(config.selector)(scene)
    kept = select_and_repair(scene, mass, forced)
    expected = mean_left_out(mass, kept)
    cells = mass_cells(mass, scene.states, config.query_tile, config.key_tile) if with_cells else None
    if not config.coarse:
        return kept.view(torch.uint8) * EXACT, expected, cells
    return torch.where(kept, EXACT, COARSE).to(torch.uint8), expected, cells


def _parts(scene: Scene) -> Iterator[Scene]:
    """The call in groups of heads."""
    batch, heads, kv_heads = *scene.q.shape[:2], scene.k.shape[1]
    cells, coordinates = batch * heads * scene.states[0, 0].numel(), scene.k.numel()
    size = int(_CELL_BYTES * cells + _KEY_BYTES * coordinates)
    groups = min(kv_heads, -(-size // _GROUP_BYTES.get(scene.q.device.type, _MANY_BYTES)))
    if groups == 1 or scene.mask.heads > 1:  # a rule for each head: the mask is of all
        yield scene
        return
    each = heads // kv_heads
    for shared in torch.arange(kv_heads).tensor_split(groups):
        own = slice(int(shared[0]), int(shared[-1]) + 1)
        rows = slice(own.start * each, own.stop * each)
        sinks = None if scene.sinks is None else scene.sinks[rows]
        yield replace(scene, q=scene.q[:, rows], k=scene.k[:, own], sinks=sinks, _moments=None, _rough=None)
