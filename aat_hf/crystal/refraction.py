"""Optics of resolution: an index along the keys, tiles of equal information, what happens where resolution changes.

What a user of attention gets: how far the keys move per token, seen by the queries (`index_field`); tile boundaries
that put the same amount of change into every tile, short where keys turn fast and long where they stand; travel times
whose level sets are tile fronts. Where the index jumps, n1 h1 = n2 h2: tile length times index stays the same.

The index is the Fisher speed of the softmax family, n = sqrt(dk' Q dk) a token with Q the second moment of the
queries, and n dx the Fisher length. Sources: M. Born and E. Wolf, *Principles of Optics*, sections 3.1 to 3.3 (eikonal,
Snell, Fermat); C. de Boor, *Good approximation by splines with variable knots* (1973) (equidistribution); J. A.
Sethian, PNAS 93 (1996) 1591 (fast marching). `grading` holds the rule for levels of neighbouring tiles.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.geometry.smooth import positive_sqrt
from aat_hf.quantum._precision import real_dtype, widened


def query_moment(q: Tensor, scale: float = 1.0) -> Tensor:
    """Second moment scale^2 E[q q'] of queries (..., rows, d): (..., d, d), what one step of a key means to them."""
    wide = widened(q) * scale
    return (wide.mT @ wide / q.shape[-2]).to(real_dtype(q))


def index_field(k: Tensor, metric: Tensor) -> Tensor:
    """Fisher speed sqrt(dk' Q dk) between neighbouring keys (..., n, d) in the metric Q (..., d, d): (..., n - 1).

    Nats a token: the root mean square over queries of the change of the score. Gradient 0 where two keys are equal.
    """
    step = widened(k).diff(dim=-2)
    squared = ((step @ widened(metric)) * step).sum(-1)
    return positive_sqrt(squared.clamp(min=0)).to(real_dtype(k, metric))


def optical_path(index: Tensor) -> Tensor:
    """Fisher length from the first key to every key, (..., n - 1) -> (..., n); the last entry is the whole length."""
    path = torch.nn.functional.pad(widened(index).cumsum(-1), (1, 0))
    return path.to(real_dtype(index))


def equal_information_boundaries(index: Tensor, tiles: int) -> Tensor:
    """Boundaries in [0, n - 1] that cut the optical path of `index` (..., n - 1) >= 0 in equal parts: (..., tiles + 1).

    Quantiles of the path, linear between keys. Across a jump of the index, tile lengths obey n1 h1 = n2 h2. Where all
    keys are equal every cut is as good; then the tiles are of equal length.

    Raises:
        ValueError: no tile, or fewer than two keys.
    """
    if tiles < 1 or index.shape[-1] < 1:
        raise ValueError(f"boundaries need a tile and two keys: {tiles} tiles, {index.shape[-1] + 1} keys")
    wide = widened(index)
    total = wide.sum(-1, keepdim=True)
    wide = torch.where(total > 0, wide / torch.where(total > 0, total, 1.0), 1 / wide.shape[-1])
    path = torch.nn.functional.pad(wide.cumsum(-1), (1, 0))
    share = torch.arange(1, tiles, dtype=wide.dtype, device=index.device) / tiles
    goal = (share * path[..., -1:]).contiguous()
    segment = torch.searchsorted(path.detach().contiguous(), goal.detach()).clamp(1, wide.shape[-1]) - 1
    inside = (goal - path.gather(-1, segment)) / wide.gather(-1, segment)
    ends = wide.new_zeros((*wide.shape[:-1], 1)), wide.new_full((*wide.shape[:-1], 1), wide.shape[-1])
    return torch.cat([ends[0], segment + inside, ends[1]], -1).to(real_dtype(index))


def whole_boundaries(boundaries: Tensor, keys: int) -> Tensor:
    """Round boundaries (..., tiles + 1) to whole tokens, 0 and `keys` at the ends, no tile empty: int64.

    Raises:
        ValueError: more tiles than keys.
    """
    tiles = boundaries.shape[-1] - 1
    if tiles > keys:
        raise ValueError(f"{tiles} tiles cannot share {keys} keys: ask for at most {keys}")
    count = torch.arange(tiles + 1, device=boundaries.device)
    whole = (boundaries.round().long() - count).cummax(-1).values + count
    whole = torch.minimum(whole, keys - (tiles - count))
    whole[..., 0], whole[..., -1] = 0, keys
    return whole


def refracted_angle(angle: Tensor, index: Tensor | float, index_beyond: Tensor | float) -> Tensor:
    """Snell's law: the angle to the normal beyond an interface, arcsin(n1 sin(angle) / n2), broadcast; radians.

    In tiling words: as many tile fronts per token along the interface on either side. NaN, with gradient 0, beyond the
    critical angle, where no ray passes.
    """
    sine = angle.sin() * index / index_beyond
    passes = sine.abs() <= 1
    return torch.where(passes, torch.where(passes, sine, 0.0).arcsin(), torch.nan)


def critical_angle(index: Tensor, index_beyond: Tensor) -> Tensor:
    """The largest angle at which a ray passes, arcsin(min(n2 / n1, 1)), broadcast; radians."""
    return (index_beyond / index).clamp(max=1).arcsin()


def travel_times(index: Tensor, front: Tensor, spacing: float | Sequence[float] = 1.0) -> Tensor:
    """Solution of the eikonal equation |grad T| = index with T = 0 on a front, by fast marching: the shape of `index`.

    In the (query, key) plane its level sets are tile fronts of equal information. Second order away from kinks, first
    order across jumps of the index. On the CPU, without gradients.

    Args:
        index: (rows, columns), or any number of dimensions; positive.
        front: same shape, a function that is 0 on the front and has another sign on either side, best the signed
            distance: it is interpolated between grid points.
        spacing: of grid points, for all dimensions or for each.

    Raises:
        ImportError: scikit-fmm is not installed.
        ValueError: an index that is not positive and finite, a front without a change of sign, or shapes that differ.
    """
    if index.shape != front.shape:
        raise ValueError(f"index {tuple(index.shape)} and front {tuple(front.shape)} must have one shape")
    if not bool((index.isfinite() & (index > 0)).all()):
        raise ValueError("the index must be positive and finite everywhere")
    if bool((front > 0).all() | (front < 0).all()):
        raise ValueError("the front must change its sign somewhere on the grid")
    try:
        skfmm = importlib.import_module("skfmm")
    except ImportError as error:
        raise ImportError(
            'scikit-fmm, which this function needs, is not installed: pip install "aat-hf[crystal]"'
        ) from error
    speed = 1 / widened(index).detach().cpu().numpy()
    times = skfmm.travel_time(widened(front).detach().cpu().numpy(), speed, dx=spacing)
    return torch.from_numpy(times).to(device=index.device, dtype=real_dtype(index))
