"""Summaries of key tiles: count, mean and diagonal variance of sub-tiles, merged exactly upwards.

The keys of a tile are an exponential family with natural parameter scale * q: the gradient of its log-partition is
the mean key, the Hessian (Fisher metric) their covariance (Amari & Nagaoka, Methods of Information Geometry, ch. 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aat_hf.geometry.fisher import diagonal_tile_metric
from aat_hf.tiling.layout import tile_keys


@dataclass(frozen=True)
class Moments:
    """Moments of groups of keys.

    Attributes:
        count: (key_tiles, groups) number of keys.
        mean: (batch, kv_heads, key_tiles, groups, head_dim).
        variance: same shape, population variance of each coordinate (the diagonal of the Fisher metric).
    """

    count: Tensor
    mean: Tensor
    variance: Tensor


def summarise(k: Tensor, key_tile: int, groups: int) -> Moments:
    """Moments of `groups` equal runs in every key tile; k (batch, kv_heads, keys, head_dim), computed in float32+."""
    size = key_tile // groups
    x = tile_keys(k, key_tile)
    x = x.to(torch.promote_types(k.dtype, torch.float32)).unflatten(3, (groups, size))
    position = torch.arange(x.shape[2] * key_tile, device=k.device).view(x.shape[2], groups, size)
    exists = position < k.shape[2]
    padded = k.shape[2] % key_tile  # with zeros
    return Moments(exists.sum(-1), *diagonal_tile_metric(x, exists if padded else None))


def merge(moments: Moments) -> Moments:
    """One group per tile from its sub-tiles, exactly (Chan, Golub & LeVeque 1983)."""
    count = moments.count.to(moments.mean)  # a quotient of integers would be float32
    w = (count / count.sum(-1, keepdim=True))[..., None]
    mean = (w * moments.mean).sum(3, keepdim=True)
    spread = moments.variance + (moments.mean - mean).square()
    return Moments(moments.count.sum(-1, keepdim=True), mean, (w * spread).sum(3, keepdim=True))


def cumulant(variance: Tensor, count: Tensor) -> Tensor:
    """log-mean-exp of `count` centred scores of this variance: Gaussian, frozen above std sqrt(2 ln count).

    Below: x^2 / 2. Above, the random-energy model (Derrida 1981): x sqrt(2 ln n) - ln n, the tangent.
    """
    log_n = count.clamp(min=1).to(variance).log()
    critical = (2 * log_n).sqrt()
    x = variance.clamp(min=0).sqrt()
    return torch.where(x < critical, variance / 2, critical * x - log_n)


def log_mass(q: Tensor, moments: Moments, scale: float, softcap: float | None = None) -> Tensor:
    """Second-order log mass of each tile: log sum_groups n exp(theta mu + f(theta' Sigma theta)), theta = scale q.

    Args:
        q: (batch, kv_heads, rows, head_dim).

    Returns:
        (batch, kv_heads, rows, key_tiles).
    """
    shape = (*q.shape[:3], *moments.count.shape)
    mean, variance = moments.mean.flatten(2, 3), moments.variance.flatten(2, 3)
    first = (scale * (q @ mean.mT)).view(shape)
    second = (scale**2 * (q.square() @ variance.mT)).view(shape)
    score = first + cumulant(second, moments.count)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score + moments.count.to(score).log()  # empty groups: -inf
    if score.shape[-1] == 1:
        return score[..., 0]
    return torch.logsumexp(score, -1)
