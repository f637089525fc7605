"""Selection with a second pass: random control rows say which heads miss their tolerance."""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.layout import control_rows
from aat_hf.tiling.masks import NONE
from aat_hf.tiling.measure import measure_rows
from aat_hf.tiling.select import Scene, select_tiles

_PASSES = 3  # first selection and at most two repairs
_GIVE_UP = 1.5  # a head still this many times over its tolerance is computed whole: its rows share no tiles


def select_and_repair(scene: Scene, mass: Tensor, forced: Tensor) -> Tensor:
    """Select; then measure control rows and select again, tighter, for the heads that miss their tolerance.

    A head that keeps missing it gets all its tiles.

    Args:
        scene: the call.
        mass: (batch, heads, query_tiles, key_tiles) estimated Born probabilities, mean over each query tile.
        forced: bool, broadcastable to `mass`: tiles that are kept in any case.

    Returns:
        bool, shape of `mass`: the exact tiles.
    """
    config = scene.config
    tolerance = torch.full(mass.shape[:2], config.tolerance, device=mass.device, dtype=mass.dtype)
    free = None if scene.sinks is None else (1 - mass.sum(-1)).clamp(min=0)
    kept = select_tiles(mass, forced, scene.states, tolerance, config.max_kept, free)
    if not config.control_rows:
        return kept
    rows = control_rows(scene.q.shape[2], config, scene.q.device)
    how = (config.key_tile, scene.scale, scene.softcap, scene.sinks)
    born = measure_rows(scene.q, scene.k, scene.mask, rows, *how).probability
    for _ in range(_PASSES - 1):
        lost = _lost(born, kept, rows, config.query_tile)
        missed = lost > config.tolerance
        if not bool(missed.any()):
            return kept
        tolerance = torch.where(missed, tolerance * config.tolerance / lost, tolerance)
        kept = select_tiles(mass, forced, scene.states, tolerance, config.max_kept, free)
    hopeless = _lost(born, kept, rows, config.query_tile) > _GIVE_UP * config.tolerance
    return torch.where(hopeless[..., None, None], scene.states != NONE, kept)


def _lost(born: Tensor, kept: Tensor, rows: Tensor, query_tile: int) -> Tensor:
    """Mean probability the control `rows` (R,) lose: (batch, heads); `born` (batch, heads, R, key_tiles)."""
    return born.masked_fill(kept[:, :, rows // query_tile], 0.0).sum(-1).mean(-1)
