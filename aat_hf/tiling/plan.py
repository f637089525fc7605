"""The tile map of a call: estimate, select, repair, for a few heads at a time so that grids of masses stay small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from aat_hf.tiling.layout import forced_tiles
from aat_hf.tiling.repair import select_and_repair
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import get_selector
from aat_hf.tiling.tile_map import COARSE, EXACT, TileMap

_GROUP_CELLS = {"cpu": 2**18}  # tile masses of the heads planned together: 1 MiB each of the grids in use
_MANY_CELLS = 2**26  # elsewhere: few launches


@torch.no_grad()
def plan(scene: Scene) -> tuple[TileMap | None, Tensor]:
    """The tile map of a call and the infidelity (batch, heads) expected of it; no map when nothing could be dropped.

    Heads that share keys are planned together, and as many such groups as keep a grid of masses small.
    """
    forced = forced_tiles(scene.mask, scene.states, scene.config)
    if bool((forced == (scene.states != 0)).all()):
        return None, torch.zeros(scene.q.shape[:2], device=scene.q.device)
    levels, expected = zip(*(_planned(part, rules) for part, rules in _parts(scene, forced)), strict=True)
    together = torch.cat(levels, 1) if len(levels) > 1 else levels[0]
    tile_map = TileMap.from_dense(together, scene.states, scene.config.query_tile, scene.config.key_tile)
    return tile_map, torch.cat(expected, 1)


def _planned(scene: Scene, forced: Tensor) -> tuple[Tensor, Tensor]:
    """Levels (batch, heads, query_tiles, key_tiles) uint8 and expected infidelity (batch, heads)."""
    mass = get_selector(scene.config.selector)(scene)
    kept = select_and_repair(scene, mass, forced)
    expected = mass.masked_fill(kept, 0.0).sum(-1).mean(-1)
    if not scene.config.coarse:
        return kept.to(torch.uint8) * EXACT, expected
    return torch.where(kept, EXACT, COARSE).to(torch.uint8), expected


def _parts(scene: Scene, forced: Tensor) -> Iterator[tuple[Scene, Tensor]]:
    """The call in groups of heads, with their forced tiles."""
    batch, heads, kv_heads = *scene.q.shape[:2], scene.k.shape[1]
    cells = batch * heads * scene.states.shape[2] * scene.states.shape[3]
    groups = min(kv_heads, -(-cells // _GROUP_CELLS.get(scene.q.device.type, _MANY_CELLS)))
    if groups == 1 or scene.mask.heads > 1:  # a rule for each head: the mask is of all
        yield scene, forced
        return
    each = heads // kv_heads
    for shared in torch.arange(kv_heads).tensor_split(groups):
        own = slice(int(shared[0]), int(shared[-1]) + 1)
        rows = slice(own.start * each, own.stop * each)
        sinks = None if scene.sinks is None else scene.sinks[rows]
        yield replace(scene, q=scene.q[:, rows], k=scene.k[:, own], sinks=sinks, _moments=None), forced
