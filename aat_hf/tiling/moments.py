"""Summaries of key tiles: count, mean and diagonal variance of sub-tiles, merged exactly upwards.

The keys of a tile are an exponential family with natural parameter scale * q: the gradient of its log-partition is
the mean key, the Hessian (Fisher metric) their covariance (Amari & Nagaoka, Methods of Information Geometry, ch. 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from aat_hf.geometry.fisher import diagonal_tile_metric
from aat_hf.tiling.layout import tile_keys, tiles

_COMPILED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of the CPU kernels


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
    return _summarise(k, key_tile, groups, 0)


def append(moments: Moments, k: Tensor, key_tile: int) -> Moments:
    """`summarise` of the keys that `moments` stand for and of k (batch, kv_heads, new_keys, head_dim) after them.

    Equal to a recomputation up to rounding. Only the tile that is still open is merged: the cost is that of the new
    keys, and a copy of the moments.

    Args:
        moments: as `summarise` or `append` give them for this `key_tile`.

    Raises:
        ValueError: they are of tiles of another size.
    """
    if not k.shape[2]:
        return moments
    keys = int(moments.count.sum())
    if tiles(keys, key_tile) != len(moments.count):
        raise ValueError(f"moments of {keys} keys in {len(moments.count)} tiles are not those of tiles of {key_tile}")
    done, inside = divmod(keys, key_tile)
    new = _summarise(k, key_tile, moments.count.shape[1], inside)
    if not inside:
        return _joined(moments, new)
    opened = _union(_tiles(moments, slice(done, None)), _tiles(new, slice(1)))
    return _joined(_joined(_tiles(moments, slice(done)), opened), _tiles(new, slice(1, None)))


def merge(moments: Moments) -> Moments:
    """One group per tile from its sub-tiles, exactly (Chan, Golub & LeVeque 1983); tiles without keys stay 0."""
    count = moments.count.to(moments.mean)  # a quotient of integers would be float32
    w = (count / count.sum(-1, keepdim=True).clamp(min=1))[..., None]
    mean = (w * moments.mean).sum(3, keepdim=True)
    spread = moments.variance + (moments.mean - mean).square()
    return Moments(moments.count.sum(-1, keepdim=True), mean, (w * spread).sum(3, keepdim=True))


def _summarise(k: Tensor, key_tile: int, groups: int, skipped: int) -> Moments:
    """Moments of keys that begin after the first `skipped` places of a tile."""
    size = key_tile // groups
    if not skipped and k.device.type == "cpu" and k.dtype in _COMPILED and not _differentiated(k):
        from aat_hf.kernels.cpu_moments import moments_of_groups  # numba, loaded when needed

        count = _sizes(k.shape[2], key_tile, groups)
        grid = len(count), groups
        return Moments(count, *(x.unflatten(2, grid) for x in moments_of_groups(k, count.numel(), size)))
    x = tile_keys(pad(k, (0, 0, skipped, 0)) if skipped else k, key_tile)
    x = x.to(torch.promote_types(k.dtype, torch.float32)).unflatten(3, (groups, size))
    position = torch.arange(x.shape[2] * key_tile, device=k.device).view(x.shape[2], groups, size)
    exists = position < skipped + k.shape[2]
    if skipped:
        exists = exists & (position >= skipped)
    padded = skipped or k.shape[2] % key_tile  # with zeros
    return Moments(exists.sum(-1), *diagonal_tile_metric(x, exists if padded else None))


def _differentiated(k: Tensor) -> bool:
    return k.requires_grad and torch.is_grad_enabled()


def _sizes(keys: int, key_tile: int, groups: int) -> Tensor:
    """Keys of each group: (key_tiles, groups) int64."""
    size, count = key_tile // groups, tiles(keys, key_tile)
    return (keys - size * torch.arange(count * groups)).clamp(0, size).view(count, groups)


def _tiles(moments: Moments, part: slice) -> Moments:
    return Moments(moments.count[part], moments.mean[:, :, part], moments.variance[:, :, part])


def _joined(first: Moments, then: Moments) -> Moments:
    means, variances = (first.mean, then.mean), (first.variance, then.variance)
    return Moments(torch.cat([first.count, then.count]), torch.cat(means, 2), torch.cat(variances, 2))


def _union(a: Moments, b: Moments) -> Moments:
    """One tile whose groups hold the keys of those of two tiles: each pair is merged as the groups of a tile."""
    means, variances = ((x[:, :, 0], y[:, :, 0]) for x, y in ((a.mean, b.mean), (a.variance, b.variance)))
    pairs = Moments(torch.cat([a.count, b.count]).mT, torch.stack(means, 3), torch.stack(variances, 3))
    merged = merge(pairs)
    return Moments(merged.count.mT, merged.mean.transpose(2, 3), merged.variance.transpose(2, 3))


def cumulant(variance: Tensor, count: Tensor) -> Tensor:
    """log-mean-exp of `count` centred scores of this variance: Gaussian, frozen above std sqrt(2 ln count).

    Below: x^2 / 2. Above, the random-energy model (Derrida 1981): x sqrt(2 ln n) - ln n, the tangent. The law of large
    n, and an upper bound at any: `geometry.free_energy` has the mean at finite n.
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
