"""The hyperboloid of curvature -1 in float64: the formulae behind `hyperbolic.Lorentz`.

What a user of attention gets: hyperbolic scores for points given by unbounded coordinates, such as lifted queries and
keys, with one smooth formula in place of arccosh. A point is its spatial part u, its time coordinate
sqrt(1 + |u|^2) is always computed; a tangent vector is its spatial part v, with time part u.v / time(u).

Shapes: points and tangent vectors (..., n), broadcast against each other; scalars keep a last dimension of 1.
Domain: |u| <= 1e70 (a radius of 160).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.geometry import smooth
from aat_hf.geometry.poincare import dot


def time(u: Tensor) -> Tensor:
    """Time coordinate of a point: (..., 1)."""
    return (1 + dot(u, u)).sqrt()


def half(u: Tensor, v: Tensor) -> Tensor:
    """sinh(d(u, v) / 2)^2: (..., 1); 0 exactly where u equals v, symmetric.

    The formula of the ball for x = u / (1 + time(u)), whose gap 2 / (1 + time(u)) needs no subtraction. The difference
    of the two points, times (1 + time(u)) (1 + time(v)), is e (1 + m) - s (e.s) / (4 m) with e = u - v, s = u + v and
    the mean m of their times. It loses at most a factor cosh(radius) to cancellation; arccosh loses its square.
    """
    e, s = u - v, u + v
    time_u, time_v = time(u), time(v)
    m = (time_u + time_v) / 2
    numerator = torch.addcmul(e * (1 + m), s, dot(e, s) / (-4 * m))
    return dot(numerator, numerator) / (4 * (1 + time_u) * (1 + time_v))


def to_frame(u: Tensor, v: Tensor) -> Tensor:
    """Coordinates of the tangent vector v at u in an orthonormal frame, the boost of the origin's axes: (..., n)."""
    t = time(u)
    return v - u * (dot(u, v) / (t * (1 + t)))


def from_frame(u: Tensor, w: Tensor) -> Tensor:
    """Spatial part of the tangent vector at u with coordinates w: the inverse of `to_frame`."""
    return w + u * (dot(u, w) / (1 + time(u)))


def exp(u: Tensor, v: Tensor) -> Tensor:
    """Exponential map: cosh|v| u + sinh|v| / |v| v."""
    w = to_frame(u, v)
    squared = dot(w, w)
    return smooth.cosh_sqrt(squared) * u + smooth.sinhc_sqrt(squared) * v


def log(u: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """Logarithm map: d / sinh d (v - cosh d u), with cosh d - 1 = 2 h and h = `half`; the inverse of `exp`."""
    return smooth.asinh_ratio(h) * ((v - u) - 2 * h * u)


def transport(u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Parallel transport of w from u to v along the geodesic: w + <v, w> / (1 - <u, v>) (u + v).

    The denominator is 2 (1 + h) >= 2. <v, w> is written with e = v - u, so that it vanishes, exactly, at v = u.
    """
    e = v - u
    time_u, time_v = time(u), time(v)
    rise = dot(e, u + v) / (time_u + time_v)  # time(v) - time(u)
    product = dot(e, w) - rise * (dot(u, w) / time_u)
    return w + product / (2 * (1 + half(u, v))) * (u + v)


def midpoint(u: Tensor, v: Tensor) -> Tensor:
    """The middle of the geodesic: (u + v) / (2 cosh(d / 2))."""
    return (u + v) / (2 * (1 + half(u, v)).sqrt())
