"""Where the time of a selection goes: its steps one by one, on the inputs of one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aat_hf.bench._timing import interleaved
from aat_hf.config import AATConfig
from aat_hf.tiling.layout import forced_tiles
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.repair import select_and_repair
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import SELECTORS, blend
from aat_hf.tiling.tile_map import EXACT, TileMap


@torch.no_grad()
def selection_steps(scene: Scene, rounds: int) -> dict[str, float]:
    """Median milliseconds of each step of `aat_hf.tiling.plan.plan` with the selector "mix", all heads together."""
    config: AATConfig = scene.config
    forced = forced_tiles(scene.mask, scene.states, config)
    mass = SELECTORS["mix"](scene)
    kept: Tensor = select_and_repair(scene, mass, forced)
    levels = kept.to(torch.uint8) * EXACT
    tiles = (config.query_tile, config.key_tile)
    steps: dict[str, Callable[[], Any]] = {
        "mask": lambda: forced_tiles(scene.mask, scene.mask.tile_states(*tiles), config),
        "summarise": partial(summarise, scene.k, config.key_tile, config.summaries),
        "measure": partial(SELECTORS["measured"], scene),
        "predict": partial(SELECTORS["moments"], scene),
        "blend": partial(blend, mass, mass, scene.states),
        "choose and repair": partial(select_and_repair, scene, mass, forced),
        "compress": partial(TileMap.from_dense, levels, scene.states, *tiles),
    }
    return {name: 1e3 * timing.median for name, timing in interleaved(steps, rounds).items()}
