"""Even functions of a length, as smooth functions of its square.

What a user of attention gets: geometric scores whose gradients are right where lengths vanish, at the diagonal and at
the origin, where a square root would divide by zero. Every function is exact to float64 rounding, and so are its
first and second derivatives; all of them act element by element and keep the shape and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALL = 1e-2  # below it a series of the given length is exact to float64 rounding
_COSH = tuple(1 / math.factorial(2 * k) for k in range(8))
_SINHC = tuple(1 / math.factorial(2 * k + 1) for k in range(8))
# asinh(sqrt h)^2 = sum_n (-1)^(n-1) (4 h)^n / (2 n^2 binom(2n, n)) (Gradshteyn & Ryzhik 1.645), divided by h.
_ASINH = tuple((-1) ** (n - 1) * 4.0**n / (2 * n * n * math.comb(2 * n, n)) for n in range(1, 12))
_RATIO = tuple(n * a for n, a in enumerate(_ASINH, 1))  # its derivative


def _series(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total


def _split(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where t is small; t there; t elsewhere. The unused parts are constants, so no branch yields a NaN gradient."""
    small = t < _SMALL
    return small, torch.where(small, t, 0.0), torch.where(small, 1.0, t)


def positive_sqrt(h: Tensor) -> Tensor:
    """sqrt(h) with gradient 0 at h = 0 (the subgradient of a distance at its minimum); h >= 0."""
    zero = h == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, h).sqrt())


def cosh_sqrt(t: Tensor) -> Tensor:
    """cosh(sqrt t), t >= 0."""
    small, near, far = _split(t)
    return torch.where(small, _series(_COSH, near), far.sqrt().cosh())


def sinhc_sqrt(t: Tensor) -> Tensor:
    """sinh(sqrt t) / sqrt t, t >= 0."""
    small, near, far = _split(t)
    root = far.sqrt()
    return torch.where(small, _series(_SINHC, near), root.sinh() / root)


def tanhc_sqrt(t: Tensor) -> Tensor:
    """tanh(sqrt t) / sqrt t, t >= 0."""
    small, near, far = _split(t)
    root = far.sqrt()
    return torch.where(small, _series(_SINHC, near) / _series(_COSH, near), root.tanh() / root)


def sech_squared_sqrt(t: Tensor) -> Tensor:
    """1 / cosh(sqrt t)^2 without overflow, t >= 0."""
    small, near, far = _split(t)
    decay = torch.exp(-2 * far.sqrt())
    return torch.where(small, _series(_COSH, near) ** -2, 4 * decay / (1 + decay) ** 2)


def cos_sqrt(t: Tensor) -> Tensor:
    """cos(sqrt t), t >= 0."""
    small, near, far = _split(t)
    return torch.where(small, _series(_COSH, -near), far.sqrt().cos())


def sinc_sqrt(t: Tensor) -> Tensor:
    """sin(sqrt t) / sqrt t, t >= 0."""
    small, near, far = _split(t)
    root = far.sqrt()
    return torch.where(small, _series(_SINHC, -near), root.sin() / root)


def asinh_squared(h: Tensor) -> Tensor:
    """asinh(sqrt h)^2, h >= 0: a quarter of the squared distance whose sinh(d / 2)^2 is h."""
    small, near, far = _split(h)
    return torch.where(small, near * _series(_ASINH, near), far.sqrt().asinh().square())


def asinh_ratio(h: Tensor) -> Tensor:
    """asinh(sqrt h) / sqrt(h (1 + h)) = d / sinh d, h >= 0."""
    small, near, far = _split(h)
    root = far.sqrt()
    return torch.where(small, _series(_RATIO, near), root.asinh() / (root * (1 + far).sqrt()))


def arcsin_squared(x: Tensor) -> Tensor:
    """arcsin(sqrt x)^2, 0 <= x < 1."""
    small, near, far = _split(x)
    far = torch.where(small, 0.5, far)
    return torch.where(small, near * _series(_ASINH, -near), far.sqrt().asin().square())


def arcsin_ratio(x: Tensor) -> Tensor:
    """arcsin(sqrt x) / sqrt(x (1 - x)) = theta / sin theta for x = sin(theta / 2)^2, 0 <= x < 1."""
    small, near, far = _split(x)
    far = torch.where(small, 0.5, far)
    root = far.sqrt()
    return torch.where(small, _series(_RATIO, -near), root.asin() / (root * (1 - far).sqrt()))
