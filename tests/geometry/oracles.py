"""Textbook formulae in 60-digit arithmetic, for the very numbers a tensor holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpmath import mp, mpf
from torch import Tensor

mp.dps = 60


def rows(function: Callable[..., mpf], *tensors: Tensor) -> Tensor:
    """`function` on the rows, as lists of mpf, of tensors (N, n): (N,) float64."""
    exact = [[[mpf(float(value)) for value in row] for row in t.double().tolist()] for t in tensors]
    return torch.tensor([float(function(*row)) for row in zip(*exact, strict=True)], dtype=torch.float64)


def dot(x: list[mpf], y: list[mpf]) -> mpf:
    return mp.fsum(a * b for a, b in zip(x, y, strict=True))


def ball_distance(c: float = 1.0) -> Callable[..., mpf]:
    """arccosh(1 + 2 c |x - y|^2 / ((1 - c |x|^2) (1 - c |y|^2))) / sqrt c."""

    def distance(x: list[mpf], y: list[mpf]) -> mpf:
        e = [a - b for a, b in zip(x, y, strict=True)]
        return mp.acosh(1 + 2 * c * dot(e, e) / ((1 - c * dot(x, x)) * (1 - c * dot(y, y)))) / mp.sqrt(c)

    return distance


def lorentz_distance(c: float = 1.0) -> Callable[..., mpf]:
    """arccosh(c (t_x t_y - x.y)) / sqrt c for spatial parts x, y."""

    def distance(x: list[mpf], y: list[mpf]) -> mpf:
        times = mp.sqrt(1 / mpf(c) + dot(x, x)) * mp.sqrt(1 / mpf(c) + dot(y, y))
        return mp.acosh(c * (times - dot(x, y))) / mp.sqrt(c)

    return distance


def fisher_rao(p: list[mpf], r: list[mpf]) -> mpf:
    """2 arccos sum sqrt(p r) of the normalised rows."""
    affinity = mp.fsum(mp.sqrt(a * b) for a, b in zip(p, r, strict=True))
    return 2 * mp.acos(affinity / mp.sqrt(mp.fsum(p) * mp.fsum(r)))


def relative(value: Tensor, exact: Tensor) -> float:
    """Largest relative error."""
    return float(((value.double() - exact).abs() / exact.abs()).max())
