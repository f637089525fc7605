"""Choosing tiles: estimated tile masses, then per head and query tile the largest until 1 - tolerance is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.tiling.masks import NONE, AttentionMask
from aat_hf.tiling.measure import RoughKeys
from aat_hf.tiling.moments import Moments, summarise


@dataclass
class Scene:
    """What a selector may look at: a call, or some of its heads where the grids of a long one would be large.

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
    _rough: RoughKeys | None = field(default=None, repr=False)

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, mask: AttentionMask, scale: float, config: AATConfig, softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Scene:  # fmt: skip
        """The scene of a whole call."""
        return cls(q, k, mask, mask.tile_states(config.query_tile, config.key_tile), scale, config, softcap, sinks)

    @property
    def moments(self) -> Moments:
        """Sub-tile moments of the keys, computed once."""
        if self._moments is None:
            self._moments = summarise(self.k, self.config.key_tile, self.config.summaries)
        return self._moments

    @property
    def rough(self) -> RoughKeys:
        """The keys for estimates, prepared once."""
        if self._rough is None:
            self._rough = RoughKeys(self.q, self.k, self.scale)
        return self._rough


Selector = Callable[[Scene], Tensor]
"""Estimated mean tile mass of the rows of each query tile: Scene -> (batch, heads, query_tiles, key_tiles)."""

UNITS = 2.0**40  # masses are rounded up to multiples of 1 / UNITS, so that sums are exact: the same in any order


def select_tiles(
    mass: Tensor,
    forced: Tensor,
    states: Tensor,
    tolerance: Tensor,
    max_kept: float,
    free_mass: Tensor | None = None,
) -> Tensor:
    """Drop the smallest tiles as long as the estimated mass dropped is <= tolerance, per head and query tile.

    Args:
        mass: (batch, heads, query_tiles, key_tiles) estimated Born probabilities; NaN counts as 1.
        forced: bool (batch or 1, heads or 1, query_tiles, key_tiles): always kept.
        states: uint8, shape as `forced`; NONE tiles are never kept.
        tolerance: (batch, heads) infidelity accepted.
        max_kept: query tiles that would keep a larger fraction keep all.
        free_mass: (batch, heads, query_tiles) probability that no tile holds (attention sinks), always kept.

    Returns:
        bool (batch, heads, query_tiles, key_tiles).
    """
    if mass.device.type == "cpu" and mass.dtype == torch.float32:
        from aat_hf.kernels.cpu_choose import choose_tiles  # numba, loaded when needed

        return choose_tiles(mass, forced, states, tolerance, max_kept, free_mass, UNITS)
    return _select_tiles(mass, forced, states, tolerance, max_kept, free_mass)


def _select_tiles(
    mass: Tensor, forced: Tensor, states: Tensor, tolerance: Tensor, max_kept: float, free_mass: Tensor | None = None
) -> Tensor:
    """`select_tiles` in PyTorch, on any device."""
    visible = states != NONE
    spare = mass.nan_to_num(nan=1.0).clamp_(0, 1).mul_(UNITS).ceil_().masked_fill_(~visible, 0.0)
    whole = spare.sum(-1, dtype=torch.float64) + (0 if free_mass is None else free_mass.double() * UNITS)
    ranked = spare.masked_fill_(forced, 0.0).sort(dim=-1).values
    dropped = ranked.cumsum(-1, dtype=torch.float64) <= (tolerance[..., None] * whole)[..., None]
    first_kept = dropped.sum(-1, keepdim=True)
    threshold = ranked.gather(-1, first_kept.clamp(max=ranked.shape[-1] - 1))
    threshold = threshold.masked_fill_(first_kept == ranked.shape[-1], float("inf"))
    kept = (spare >= threshold).logical_or_(forced).logical_and_(visible)  # of equal tiles all or none
    crowded = kept.sum(-1, keepdim=True) > max_kept * visible.sum(-1, keepdim=True, dtype=torch.float64)
    return torch.where(crowded, visible, kept)


def mean_left_out(mass: Tensor, kept: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean over R rows of the mass outside the kept tiles of their query tiles: (batch, heads).

    Args:
        mass: (batch, heads, R, key_tiles); kept: bool (batch, heads, query_tiles, key_tiles).
        rows: (R,) int64, the query tile of each; without them there is one row for each query tile.
    """
    if mass.device.type == "cpu" and mass.dtype == torch.float32:
        from aat_hf.kernels import cpu_masses  # numba, loaded when needed

        return cpu_masses.mean_left_out(mass, kept, rows)
    return mass.masked_fill(kept if rows is None else kept[:, :, rows], 0.0).sum(-1).mean(-1)
