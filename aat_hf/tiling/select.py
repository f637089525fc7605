"""Choosing tiles: estimated tile masses, then per head and query tile the largest until 1 - tolerance is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.tiling.masks import NONE, AttentionMask
from aat_hf.tiling.moments import Moments, summarise


@dataclass
class Scene:
    """What a selector may look at.

    Attributes:
        q: (batch, heads, queries, head_dim); k: (batch, kv_heads, keys, head_dim).
        mask: who sees whom; states: how it meets each tile pair (batch or 1, heads or 1, query_tiles, key_tiles).
        scale, softcap, sinks: the score is softcap(scale * q k); `sinks` (heads,) logits of a virtual key.
        config: the settings in force.
    """

    q: Tensor
    k: Tensor
    mask: AttentionMask
    states: Tensor
    scale: float
    config: AATConfig
    softcap: float | None = None
    sinks: Tensor | None = None
    _moments: Moments | None = field(default=None, repr=False)

    @property
    def moments(self) -> Moments:
        """Sub-tile moments of the keys, computed once."""
        if self._moments is None:
            self._moments = summarise(self.k, self.config.key_tile, self.config.subtiles)
        return self._moments


Selector = Callable[[Scene], Tensor]
"""Estimated mean tile mass of the rows of each query tile: Scene -> (batch, heads, query_tiles, key_tiles)."""


def select_tiles(
    mass: Tensor,
    forced: Tensor,
    states: Tensor,
    tolerance: Tensor,
    max_kept: float,
    free_mass: Tensor | None = None,
) -> Tensor:
    """The smallest set of tiles with estimated mass >= 1 - tolerance, per head and query tile.

    Args:
        mass: (batch, heads, query_tiles, key_tiles) estimated Born probabilities; NaN counts as kept.
        forced: bool, broadcastable to `mass`: always kept.
        states: broadcastable to `mass`; NONE tiles are never kept.
        tolerance: (batch, heads) infidelity accepted.
        max_kept: query tiles that would keep a larger fraction keep all.
        free_mass: (batch, heads, query_tiles) probability that no tile holds (attention sinks), always kept.

    Returns:
        bool (batch, heads, query_tiles, key_tiles).
    """
    visible = states != NONE
    mass = mass.nan_to_num(nan=1.0).clamp(min=0).masked_fill(~visible, 0.0)
    target = mass.sum(-1) * (1 - tolerance[..., None])
    if free_mass is not None:
        target = target - tolerance[..., None] * free_mass
    rank_score = torch.where(forced, mass + 2.0, mass).masked_fill(~visible, -1.0)
    order = rank_score.argsort(dim=-1, descending=True, stable=True)
    ranked = mass.gather(-1, order).double()
    before = ranked.cumsum(-1) - ranked
    kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order, before < target[..., None])
    kept = (kept | forced) & visible
    crowded = kept.sum(-1, keepdim=True) > max_kept * visible.sum(-1, keepdim=True)
    return torch.where(crowded, visible, kept)
