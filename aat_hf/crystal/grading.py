"""Levels of neighbouring tiles: the 2:1 rule, and smoothing that keeps mass and range.

What a user of attention gets: a map of levels (tile size 2^level) in which neighbours differ by at most one, made by
refining only, so that nothing is lost; and a smoother resolution field to round to such levels. Graded maps have no
tile beside one a quarter of its size, as adaptive meshes and kernels want it.

Sources: H. Samet, *The Quadtree and Related Hierarchical Data Structures*, ACM Comput. Surv. 16 (1984) (restricted
quadtrees); P. Felzenszwalb and D. Huttenlocher, Theory of Computing 8 (2012) 415, section 2.1 (the transform).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.quantum._precision import real_dtype, widened


def levels_of_equal_information(index: Tensor, information: float, coarsest: int) -> Tensor:
    """The coarsest level whose tile of 2^level tokens holds at most `information`: int64, the shape of `index` >= 0.

    index 2^level <= information; never below 0 nor above `coarsest`. Follow it by `grade`.
    """
    return torch.log2(information / widened(index)).floor().clamp(0, coarsest).long()


def grade(levels: Tensor, dims: Sequence[int] = (-1,)) -> Tensor:
    """The coarsest map below `levels` in which neighbours along `dims` differ by at most 1: same shape and dtype.

    min over tiles y of level(y) + distance(x, y), the distance counted in steps along `dims`: exact in one pass
    forward and one backward for each dimension. Integers or floats.
    """
    graded = levels if levels.is_floating_point() else levels.long()  # uint8 has no negative numbers
    for dim in dims:
        count = torch.arange(levels.shape[dim], device=levels.device)
        steps = count.view(-1, *[1] * (levels.ndim - 1 - dim % levels.ndim)).to(graded.dtype)
        forward = (graded - steps).cummin(dim).values + steps
        backward = (graded + steps).flip(dim).cummin(dim).values.flip(dim) - steps
        graded = torch.minimum(forward, backward)
    return graded.to(levels.dtype)


def is_graded(levels: Tensor, dims: Sequence[int] = (-1,)) -> bool:
    """Whether neighbours along `dims` differ by at most 1."""
    wide = levels if levels.is_floating_point() else levels.long()
    return all(bool((wide.diff(dim=dim).abs() <= 1).all()) for dim in dims)


def smoothed(field: Tensor, strength: float, dims: Sequence[int] = (-1,)) -> Tensor:
    """Solve (1 + strength L) R = field, L the Laplacian of the grid along `dims`, ends free: the shape of `field`.

    The minimum of |R - field|^2 / 2 + strength / 2 R'LR. The sum is kept, R stays between the smallest and the largest
    value of `field`, and its roughness R'LR never grows. Solved exactly in the cosine basis that diagonalises L; dense
    transforms, so n^2 work a line.

    Raises:
        ValueError: negative strength.
    """
    if not strength >= 0:
        raise ValueError(f"strength must not be negative, got {strength}")
    moved = widened(field).movedim(tuple(dims), tuple(range(-len(dims), 0)))
    bases = [_cosines(n, field.device) for n in moved.shape[-len(dims) :]]
    eigenvalues = torch.zeros((), dtype=torch.float64, device=field.device)
    for _, values in bases:
        eigenvalues = eigenvalues[..., None] + values
    solution = _transformed(moved, [basis.mT for basis, _ in bases]) / (1 + strength * eigenvalues)
    solution = _transformed(solution, [basis for basis, _ in bases])
    return solution.movedim(tuple(range(-len(dims), 0)), tuple(dims)).to(real_dtype(field))


def _cosines(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthonormal eigenvectors (n, n), in columns, and eigenvalues (n,) of the Laplacian of a path (DCT-II)."""
    order = torch.arange(n, dtype=torch.float64, device=device)
    basis = torch.cos(math.pi / n * (order[:, None] + 0.5) * order) * math.sqrt(2 / n)
    basis[:, 0] = 1 / math.sqrt(n)
    return basis, 4 * torch.sin(math.pi * order / (2 * n)).square()


def _transformed(x: Tensor, bases: list[Tensor]) -> Tensor:
    """Apply one matrix to each of the last dimensions of x."""
    for basis in bases:
        x = x.movedim(-len(bases), -1) @ basis.mT
    return x
