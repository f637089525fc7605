"""Selection with a second pass: random control rows say which heads miss their tolerance."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aat_hf.tiling.layout import control_rows
from aat_hf.tiling.masks import NONE
from aat_hf.tiling.measure import measure_rows
from aat_hf.tiling.select import Scene, mean_left_out, select_tiles
from aat_hf.tiling.selectors import oracle

_PASSES = 3  # first selection and at most two repairs
_GIVE_UP = 1.5  # a head still this many times over its tolerance is measured whole: its rows share no tiles


def select_and_repair(scene: Scene, mass: Tensor, forced: Tensor) -> Tensor:
    """Select; then measure control rows and select again, tighter, for the heads that miss their tolerance.

    A head that keeps missing it is measured exactly, at half the cost of computing it.

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
    born = measure_rows(scene.q, scene.k, scene.mask, rows, *how, rough=scene.rough).probability
    for _ in range(_PASSES - 1):
        lost = mean_left_out(born, kept, rows // config.query_tile)
        missed = lost > config.tolerance
        if not bool(missed.any()):
            return kept
        tolerance = torch.where(missed, tolerance * config.tolerance / lost, tolerance)
        kept[missed] = _again(mass, forced, scene.states, tolerance, config.max_kept, free, missed)
    hopeless = mean_left_out(born, kept, rows // config.query_tile) > _GIVE_UP * config.tolerance
    if not bool(hopeless.any()):
        return kept
    heads = hopeless.any(0).nonzero()[:, 0]
    kept[:, heads] = _exactly(scene, heads, _of(forced, heads))
    return kept


def _again(
    mass: Tensor, forced: Tensor, states: Tensor, tolerance: Tensor, max_kept: float, free: Tensor | None, heads: Tensor
) -> Tensor:
    """Tiles of the `heads` (batch, heads) bool alone: (M, query_tiles, key_tiles)."""
    if forced.shape[:2] != (1, 1):
        forced, states = (x.expand_as(mass)[heads][None] for x in (forced, states))
    free = None if free is None else free[heads][None]
    return select_tiles(mass[heads][None], forced, states, tolerance[heads][None], max_kept, free)[0]


def _exactly(scene: Scene, heads: Tensor, forced: Tensor) -> Tensor:
    """Tiles of single `heads` (H',) chosen from the exact masses of all their rows."""
    if scene.mask.heads > 1:  # a rule for each head: keep what it allows
        return _of(scene.states, heads) != NONE
    group = scene.q.shape[1] // scene.k.shape[1]
    sinks = None if scene.sinks is None else scene.sinks[heads]
    part = replace(scene, q=scene.q[:, heads], k=scene.k[:, heads // group], sinks=sinks, _moments=None, _rough=None)
    mass = oracle(part)
    free = None if sinks is None else (1 - mass.sum(-1)).clamp(min=0)
    tolerance = torch.full(mass.shape[:2], scene.config.tolerance, device=mass.device, dtype=mass.dtype)
    return select_tiles(mass, forced, scene.states, tolerance, scene.config.max_kept, free)


def _of(x: Tensor, heads: Tensor) -> Tensor:
    """The part of (batch or 1, heads or 1, ...) that belongs to `heads`."""
    return x if x.shape[1] == 1 else x[:, heads]
