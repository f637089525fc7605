"""How many heads are named alike from attention, tile masses and tile maps, for theory_pictures.py."""

from __future__ import annotations

import torch
from theory_layers import Layers
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.patterns import MassCells, classify, mass_cells
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.plan import plan
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import get_selector
from aat_hf.tiling.tile_map import TileMap


def pattern_numbers(layers: Layers) -> None:
    """Print them, at the default settings."""
    attention, masses, maps = [], [], []
    for layer in layers.values():
        mass, tile_map = _planned(layer.q[None], layer.k[None], layer.scale)
        weights = torch.stack([layer.attention(head).float() for head in range(len(layer.q))])
        attention += classify(weights[None]).names[0]
        masses += classify(mass).names[0]
        maps += classify(tile_map).names[0]
    for name, found in (("tile masses", masses), ("tile maps", maps)):
        alike = sum(a == b for a, b in zip(attention, found, strict=True))
        print(f"patterns: {name} name {alike} of {len(attention)} heads as their attention does")


def _planned(q: Tensor, k: Tensor, scale: float) -> tuple[MassCells, TileMap]:
    """Cells of the masses that selection estimates, and the map that it makes of them."""
    config = AATConfig()
    scene = Scene.of(q, k, causal_mask(q.shape[2], k.shape[2], q.device), scale, config)
    mass = get_selector(config.selector)(scene)
    tile_map, _ = plan(scene)
    if tile_map is None:
        raise ValueError("nothing can be dropped of so short a text")
    return mass_cells(mass, scene.states, config.query_tile, config.key_tile), tile_map
