"""Scores as row + column + diagonal: the measured vertical lines and slashes of a head.

What a user of attention gets: how much of a head's scores is explained by which key it is (vertical), by how far back
it is (slash), by both, and by its tile (block), as fractions of the variance; and the two profiles themselves, to set
beside the prediction of `lattice.slash_profile`.

Softmax does not see a constant added to a row, so scores are s(i, j) = r(i) + c(j) + t(i - j) + e(i, j) with r free,
fitted by weighted least squares over the allowed pairs. Constants move freely between the terms, and so does a ramp
a (i - j): it is given to t (as in ALiBi), c and t have weighted mean 0. Source: A. Buja, T. Hastie and R. Tibshirani,
*Linear smoothers and additive models*, Ann. Statist. 17 (1989) 453.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.crystal._groups import sum_blocks
from aat_hf.quantum._precision import real_dtype, widened


class Fit(NamedTuple):
    """Terms of the scores; entries without any weight are 0.

    row: (..., queries); column: (..., keys); offset: (..., queries + keys - 1), entry d + keys - 1 belongs to query
    minus key = d; residual: (..., queries, keys), 0 where the weight is.
    """

    row: Tensor
    column: Tensor
    offset: Tensor
    residual: Tensor


class Explained(NamedTuple):
    """Fractions in [0, 1] of the weighted variance within rows, each (...).

    vertical, slash: of either alone; both: of the joint fit; block: of tile means of what is left of it, on top.
    """

    vertical: Tensor
    slash: Tensor
    both: Tensor
    block: Tensor


def fit_scores(scores: Tensor, weight: Tensor, column: bool = True, offset: bool = True, steps: int = 200) -> Fit:
    """Weighted least squares of scores (..., queries, keys) by row, column and offset terms.

    Conjugate gradients on the normal equations, preconditioned by the weight of each term; they stop when the
    gradient has fallen by 1e-10 or after `steps`. O(queries keys) a step.

    Args:
        weight: (..., queries, keys) >= 0, or bool: the allowed pairs. Scores without weight may be anything.
        column, offset: fit this term.
    """
    wide_weight = widened(weight).expand(scores.shape)
    target = torch.where(wide_weight > 0, widened(scores), 0.0)
    target = target - _row_mean(target, wide_weight)
    terms = _solve(target, wide_weight, (column, offset), steps)
    c, t = _ramp_to_offset(*terms, wide_weight) if column and offset else terms
    c, t = _centred(c, wide_weight.sum(-2)), _centred(t, diagonal_sums(wide_weight))
    fitted = c[..., None, :] + toeplitz(t, scores.shape[-1])
    residual = torch.where(wide_weight > 0, widened(scores), 0.0) - fitted
    row = _row_mean(residual, wide_weight)
    residual = torch.where(wide_weight > 0, residual - row, 0.0)
    return Fit(*(x.to(real_dtype(scores)) for x in (row[..., 0], c, t, residual)))


def explained(scores: Tensor, weight: Tensor, tile: int, steps: int = 200) -> Explained:
    """How much of scores (..., queries, keys) is vertical, slash and block; `weight` as in `fit_scores`. Three fits.

    1 everywhere for scores that are constant in every row.
    """
    wide_weight = widened(weight).expand(scores.shape)
    fits = [fit_scores(scores, weight, *terms, steps) for terms in ((True, False), (False, True), (True, True))]
    flat = fit_scores(scores, weight, False, False)
    whole = _variance(flat.residual, wide_weight)
    vertical, slash, both = (_fraction(_variance(fit.residual, wide_weight), whole) for fit in fits)
    rest = widened(fits[2].residual)
    mass = sum_blocks(wide_weight, tile)
    mean = sum_blocks(rest * wide_weight, tile) / torch.where(mass > 0, mass, 1.0)
    spread = mean.repeat_interleave(tile, -2).repeat_interleave(tile, -1)
    spread = spread[..., : scores.shape[-2], : scores.shape[-1]]
    left = rest - spread
    block = _fraction(_variance(left, wide_weight), whole) - both
    return Explained(*(x.to(real_dtype(scores)) for x in (vertical, slash, both, block)))


def block_fraction(scores: Tensor, weight: Tensor, counts: Iterable[int]) -> Tensor:
    """Largest fraction of the variance of row-centred scores that is between square blocks: (...) in [0, 1].

    Args:
        scores, weight: (..., queries, keys), the weight >= 0.
        counts: numbers of blocks along the keys that are tried; blocks of a single entry are not.
    """
    best = torch.zeros_like(scores[..., 0, 0])
    whole = (weight * scores.square()).sum((-2, -1))
    for side in sorted({-(-scores.shape[-1] // count) for count in counts} - {1}):
        mass, total = sum_blocks(weight, side), sum_blocks(scores * weight, side)
        between = (total.square() / torch.where(mass > 0, mass, 1.0)).sum((-2, -1))
        best = torch.maximum(best, between / torch.where(whole > 0, whole, 1.0))
    return best


def diagonal_sums(x: Tensor) -> Tensor:
    """Sum of x (..., queries, keys) over each diagonal: (..., queries + keys - 1), by query minus key, ascending."""
    queries, keys = x.shape[-2:]
    width = queries + keys - 1
    padded = torch.nn.functional.pad(x.flip(-1), (0, queries)).flatten(-2)
    return padded[..., : queries * width].unflatten(-1, (queries, width)).sum(-2)  # row i moved i to the right


def toeplitz(offset: Tensor, keys: int) -> Tensor:
    """Matrices (..., queries, keys) of offset(i - j), (..., queries + keys - 1) in the order of `diagonal_sums`."""
    return offset.unfold(-1, keys, 1).flip(-1)


def _row_mean(x: Tensor, weight: Tensor) -> Tensor:
    mass = weight.sum(-1, keepdim=True)
    return (x * weight).sum(-1, keepdim=True) / torch.where(mass > 0, mass, 1.0)


def _solve(target: Tensor, weight: Tensor, wanted: tuple[bool, bool], steps: int) -> tuple[Tensor, Tensor]:
    """Column and offset terms by preconditioned conjugate gradients, row means eliminated from both sides."""
    keys = target.shape[-1]
    scales = [weight.sum(-2), diagonal_sums(weight)]
    scales = [torch.where((s > 0) & use, s, torch.inf) for s, use in zip(scales, wanted, strict=True)]
    precondition = torch.cat(scales, -1).reciprocal()

    def pull(residual: Tensor) -> Tensor:
        heavy = (residual - _row_mean(residual, weight)) * weight
        return torch.cat([heavy.sum(-2), diagonal_sums(heavy)], -1)

    def push(terms: Tensor) -> Tensor:
        return terms[..., None, :keys] + toeplitz(terms[..., keys:], keys)

    gradient = pull(target)
    solution = torch.zeros_like(gradient)
    step = precondition * gradient
    size = first = (gradient * step).sum(-1, keepdim=True)
    for _ in range(steps):
        if bool((size <= 1e-20 * first).all()):
            break
        image = pull(push(step))
        curvature = (step * image).sum(-1, keepdim=True)
        length = torch.where(curvature > 0, size / torch.where(curvature > 0, curvature, 1.0), 0.0)
        solution = solution + length * step
        gradient = gradient - length * image
        new = (gradient * precondition * gradient).sum(-1, keepdim=True)
        step = precondition * gradient + torch.where(size > 0, new / torch.where(size > 0, size, 1.0), 0.0) * step
        size = new
    return solution[..., :keys], solution[..., keys:]


def _ramp_to_offset(c: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Move the linear part of the column term to the offset term: a j = a i - a (i - j), and a i is a row term."""
    mass = weight.sum(-2)
    position = torch.arange(c.shape[-1], dtype=c.dtype, device=c.device).expand(c.shape)
    ramp = _centred(position, mass)
    spread = (mass * ramp.square()).sum(-1, keepdim=True)
    slope = (mass * ramp * c).sum(-1, keepdim=True) / torch.where(spread > 0, spread, 1.0)
    distance = torch.arange(t.shape[-1], dtype=c.dtype, device=c.device) - (c.shape[-1] - 1)
    seen = diagonal_sums(weight) > 0
    return torch.where(mass > 0, c - slope * position, 0.0), torch.where(seen, t - slope * distance, 0.0)


def _centred(x: Tensor, mass: Tensor) -> Tensor:
    total = mass.sum(-1, keepdim=True)
    mean = (x * mass).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
    return torch.where(mass > 0, x - mean, 0.0)


def _variance(residual: Tensor, weight: Tensor) -> Tensor:
    return (widened(residual).square() * weight).sum((-2, -1))


def _fraction(left: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, 1 - left / torch.where(whole > 0, whole, 1.0), 1.0)
