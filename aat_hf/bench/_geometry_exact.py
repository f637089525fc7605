"""The formulae of `aat bench geometry` in 60-digit arithmetic (mpmath), of the very numbers that libraries get."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DIGITS = 60


def exact(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    """`function(mp, *rows)` of the rows of tensors (N, n), lists, or (N, n, n), mpmath matrices: (N,) float64."""
    mpmath = importlib.import_module("mpmath")
    with mpmath.workdps(_DIGITS):
        values = [float(function(mpmath.mp, *(_of(mpmath.mp, x) for x in row))) for row in zip(*tensors, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _of(mp: Any, x: Tensor) -> Any:
    if x.ndim == 2:
        return mp.matrix(x.tolist())
    return [mp.mpmathify(value) for value in x.tolist()]


def ball_distance(mp: Any, x: Any, y: Any) -> Any:
    """Of points in the Poincare ball."""
    gaps = (1 - mp.fsum(a * a for a in x)) * (1 - mp.fsum(b * b for b in y))
    return mp.acosh(1 + 2 * mp.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / gaps)


def lorentz_distance(mp: Any, x: Any, y: Any) -> Any:
    """Of the spatial parts: float32 time coordinates do not lie on the hyperboloid."""
    times = mp.sqrt(1 + mp.fsum(a * a for a in x[1:])) * mp.sqrt(1 + mp.fsum(b * b for b in y[1:]))
    return mp.acosh(times - mp.fsum(a * b for a, b in zip(x[1:], y[1:], strict=True)))


def fisher_distance(mp: Any, p: Any, r: Any) -> Any:
    """Of rows divided by their sums."""
    affinity = mp.fsum(mp.sqrt(a * b) for a, b in zip(p, r, strict=True))
    return 2 * mp.acos(affinity / mp.sqrt(mp.fsum(p) * mp.fsum(r)))


def fidelity(mp: Any, a: Any, b: Any) -> Any:
    """Of pure states, divided by their norms."""
    overlap = mp.fsum(mp.conj(x) * y for x, y in zip(a, b, strict=True))
    return abs(overlap) ** 2 / (mp.fsum(abs(x) ** 2 for x in a) * mp.fsum(abs(y) ** 2 for y in b))


def infidelity(mp: Any, a: Any, b: Any) -> Any:
    """1 - `fidelity`."""
    return 1 - fidelity(mp, a, b)


def mixed_fidelity(mp: Any, rho: Any, sigma: Any) -> Any:
    """Of density matrices, divided by their traces."""
    levels, vectors = mp.eighe(rho)
    root = vectors * mp.diag([mp.sqrt(max(level, mp.mpf(0))) for level in levels]) * vectors.H
    inner = mp.eighe(root * sigma * root, eigvals_only=True)
    total = mp.fsum(mp.sqrt(max(level, mp.mpf(0))) for level in inner)
    return total**2 / (_trace(mp, rho) * _trace(mp, sigma))


def mixed_infidelity(mp: Any, rho: Any, sigma: Any) -> Any:
    """1 - `mixed_fidelity`."""
    return 1 - mixed_fidelity(mp, rho, sigma)


def entropy(mp: Any, rho: Any) -> Any:
    """Of a density matrix, divided by its trace; what rounding made negative counts as 0."""
    levels = [max(level, mp.mpf(0)) for level in mp.eighe(rho, eigvals_only=True)]
    total = mp.fsum(levels)
    return -mp.fsum(level / total * mp.log(level / total) for level in levels if level > 0)


def _trace(mp: Any, matrix: Any) -> Any:
    return mp.fsum(mp.re(matrix[i, i]) for i in range(matrix.rows))
