"""How long a choice of tiles stays right while queries move.

What a user of attention gets: a certificate that decisions cannot flip within an error bound (`certified`), how much
two tile maps differ (`jaccard`), and how much more a reused map can lose after the query has changed. The last bound
always holds but is loose on real heads: reuse of a map should rest on a measured infidelity where one is to be had.

Source of the drift bound: Popoviciu's inequality (std <= range / 2) along the path q + t delta, along which the
Fisher-Rao speed of softmax is the standard deviation of delta.k under the attention row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.quantum._precision import real_dtype, widened


def query_drift_bound(k: Tensor, delta: Tensor) -> Tensor:
    """Upper bound of the Fisher-Rao distance between the attention rows of q and of q + delta: (...), radians.

    (max_j delta.k_j - min_j delta.k_j) / 2, whatever q is.

    Args:
        k: (..., n, d) keys.
        delta: (..., d) change of the query, the scale of the scores included.
    """
    change = (widened(k) @ widened(delta)[..., None])[..., 0]
    return ((change.amax(-1) - change.amin(-1)) / 2).to(real_dtype(k, delta))


def infidelity_after_drift(infidelity: Tensor, distance: Tensor) -> Tensor:
    """Upper bound of the infidelity of a tile map, `infidelity` (...) when made, after its row moved by `distance`.

    sin^2(arcsin sqrt(infidelity) + distance / 2), at most 1: the angle between states is half the Fisher-Rao distance,
    and the triangle inequality holds for angles. Shapes are broadcast.
    """
    angle = widened(infidelity).sqrt().arcsin() + widened(distance) / 2
    return angle.clamp(max=torch.pi / 2).sin().square().to(real_dtype(infidelity, distance))


def certified(score: Tensor, threshold: Tensor | float, bound: Tensor | float) -> Tensor:
    """Decisions score >= threshold that no error up to `bound` can flip, broadcast: bool, the shape of the three."""
    return (score - threshold).abs() > bound


def jaccard(kept: Tensor, other: Tensor) -> Tensor:
    """Tiles in both maps / tiles in either, bool (..., query_tiles, key_tiles): (...) float32; 1 if both are empty."""
    both = (kept & other).sum((-2, -1))
    either = (kept | other).sum((-2, -1))
    return torch.where(either > 0, both / either.clamp(min=1), torch.ones((), device=kept.device))
