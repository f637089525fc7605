"""Certificates: what a tile can weigh at most, known from its ball or its box of keys, without scoring the keys.

For theta = scale * q and the n keys of tile J, with mean mu, all within radius r of it and between low and high:

    log sum_{j in J} exp(theta k_j) <= log n + theta mu + |theta| r                               (ball)
    log sum_{j in J} exp(theta k_j) <= log n + sum_d max(theta_d low_d, theta_d high_d)           (box)

Both follow from sum_j exp(s_j) <= n exp(max_j s_j), with Cauchy-Schwarz and coordinate by coordinate (Quest, Tang et
al. 2024). They hold for every query, unlike estimates and audits, and are loose in many dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.tiling.layout import group_heads, tile_keys, tiles

_CHUNK_ELEMENTS = 1 << 22  # bounds of rows held at a time (32 MiB)


class TileBounds(NamedTuple):
    """Upper bounds of the mean tile masses of a query tile's rows: each (batch, heads, query_tiles, key_tiles).

    either: of rows that take the smaller of both bounds, so that it may be below both means. All at most 1.
    """

    ball: Tensor
    box: Tensor
    either: Tensor


def certified(bound: Tensor, culled: Tensor, tolerance: float) -> Tensor:
    """Share of the culled tiles whose `bound`, of `TileBounds`, is at most the tolerance: (batch, heads); NaN if none.

    Args:
        culled: bool, shape of `bound`.
    """
    return (culled & (bound <= tolerance)).sum((-1, -2)) / culled.sum((-1, -2))


def certified_query_tiles(bound: Tensor, culled: Tensor, tolerance: float) -> Tensor:
    """Share of the query tiles that cull, whose culled tiles together are bounded by the tolerance: (batch, heads)."""
    together = bound.masked_fill(~culled, 0.0).sum(-1) <= tolerance
    culls = culled.any(-1)
    return (together & culls).sum(-1) / culls.sum(-1)


@torch.no_grad()
def tile_bounds(
    q: Tensor, k: Tensor, lse: Tensor, query_tile: int, key_tile: int, scale: float, softcap: float | None = None
) -> TileBounds:
    """Bounds of all tile pairs, in float64, for O(queries * key_tiles * head_dim): 3 / key_tile of all scores.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        lse: (batch, heads, queries) exact log-sum-exp of the rows; rows of -inf see no key and count for nothing.
        softcap: scores are softcap * tanh(score / softcap), which bounds as well: tanh is monotone.

    Returns:
        Bounds that hold to the accuracy of `lse`. A mask that cuts a tile only lowers its mass.
    """
    log_count, mean, radius, low, high = _key_bounds(k.double(), key_tile)
    step = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * query_tile * len(log_count)))
    parts = []
    for start in range(0, q.shape[2], step * query_tile):
        rows = slice(start, start + step * query_tile)
        theta = group_heads(scale * q[:, :, rows].double(), k.shape[1])
        ball = theta @ mean.mT + theta.norm(dim=-1, keepdim=True) * radius[:, :, None]
        box = theta.clamp(min=0) @ high.mT + theta.clamp(max=0) @ low.mT
        masses = []
        for score in (ball, box, torch.minimum(ball, box)):
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            score = score.view(*lse[:, :, rows].shape, -1) + log_count - lse[:, :, rows, None]
            masses.append(_mean_over_tiles(score.exp().clamp(max=1.0), lse[:, :, rows], query_tile))
        parts.append(masses)
    return TileBounds(*(torch.cat(part, 2) for part in zip(*parts, strict=True)))


def _key_bounds(k: Tensor, key_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log n (key_tiles,), and by batch row, head and tile the mean, radius (no last dimension), low and high."""
    position = torch.arange(tiles(k.shape[2], key_tile) * key_tile, device=k.device).view(-1, key_tile, 1)
    missing = position >= k.shape[2]
    count = (~missing).sum(1).double()
    x = tile_keys(k, key_tile)  # padding is zero
    mean = x.sum(3) / count
    radius = (x - mean[:, :, :, None]).masked_fill(missing, 0.0).norm(dim=-1).amax(-1)
    low, high = x.masked_fill(missing, torch.inf).amin(3), x.masked_fill(missing, -torch.inf).amax(3)
    return count[:, 0].log(), mean, radius, low, high


def _mean_over_tiles(mass: Tensor, lse: Tensor, query_tile: int) -> Tensor:
    """Mean over the rows of each query tile that see a key: (batch, heads, query_tiles, key_tiles)."""
    sees = lse > -torch.inf
    padding = -lse.shape[2] % query_tile
    mass = torch.nn.functional.pad(mass.masked_fill(~sees[..., None], 0.0), (0, 0, 0, padding))
    count = torch.nn.functional.pad(sees, (0, padding)).unflatten(2, (-1, query_tile)).sum(-1)
    return mass.unflatten(2, (-1, query_tile)).sum(3) / count.clamp(min=1)[..., None]
