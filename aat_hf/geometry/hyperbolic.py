"""Hyperbolic space of any curvature: Poincare ball and Lorentz model, with the method names of geoopt.

What a user of attention gets: scores -d(q, k)^2 and averages for models trained with hyperbolic queries and keys,
right in float32 to a radius of 15 and for neighbours 1e-3 apart, d(x, x) = 0 exactly, and gradients that stay finite
and right at coincident points and at the origin.

Computed in float64 and returned in the inputs' dtype. The formulae, with their sources, are those of `poincare` and
`lorentz` at curvature -1; curvature -c is reached by scaling points and tangent vectors with sqrt c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from aat_hf.geometry import lorentz, pairs, poincare, smooth
from aat_hf.geometry.blocks import in_blocks

_EPS64 = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class _Hyperbolic:
    c: float | Tensor = 1.0

    def __post_init__(self) -> None:
        c = float(self.c.detach() if isinstance(self.c, Tensor) else self.c)
        if not 0 < c < float("inf"):
            raise ValueError(f"c must be positive and finite, got {c}")

    def _root(self, like: Tensor) -> Tensor:
        return torch.as_tensor(self.c, dtype=torch.float64, device=like.device).sqrt()

    @property
    def _is_unit(self) -> bool:
        return isinstance(self.c, (int, float)) and self.c == 1

    def _unit(self, x: Tensor) -> Tensor:
        """A point or tangent vector at curvature -1, float64."""
        return x.double() if self._is_unit else x.double() * self._root(x)

    def _restore(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `_unit`."""
        return x.to(dtype) if self._is_unit else (x / self._root(x)).to(dtype)

    def _half(self, x: Tensor, y: Tensor) -> Tensor:
        """sinh(sqrt c d / 2)^2: (..., 1) float64."""
        raise NotImplementedError

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Distance, 2 asinh(sqrt h) / sqrt c with h = sinh(sqrt c d / 2)^2: (...); its gradient at x = y is 0."""
        distance = self._restore(2 * smooth.positive_sqrt(self._half(x, y)).asinh(), _dtype(x, y))
        return distance if keepdim else distance.squeeze(-1)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Squared distance: (...); smooth everywhere, its gradient with respect to x is -2 logmap(x, y)."""
        squared = (4 * smooth.asinh_squared(self._half(x, y)) / self._root(x).square()).to(_dtype(x, y))
        return squared if keepdim else squared.squeeze(-1)


@dataclass(frozen=True)
class PoincareBall(_Hyperbolic):
    """Poincare ball: points (..., n) with sqrt c |x| < 1, metric (2 / (1 - c |x|^2))^2 |dx|^2.

    float32 holds points up to a radius of 17 / sqrt c, but rounding moves them by 6e-8 (2 / (1 - c |x|^2)) / sqrt c:
    0.1 / sqrt c at radius 15; the Lorentz model holds a radius of 88. Points outside give NaN; `projx` brings them
    back.

    Attributes:
        c: minus the curvature, a number, or a tensor of no dimensions to learn it.

    Raises:
        ValueError: c is not a positive finite number.
    """

    def _half(self, x: Tensor, y: Tensor) -> Tensor:
        return in_blocks(lambda x, y: poincare.half(self._unit(x), self._unit(y)), x, y)

    def _map(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """A map of points and tangent vectors at curvature -1, at this one."""
        dtype = _dtype(*tensors)
        return in_blocks(lambda *block: self._restore(function(*map(self._unit, block)), dtype), *tensors)

    def origin(
        self, *size: int | tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """The origin, zeros of this size."""
        return torch.zeros(*size, dtype=dtype, device=device)  # type: ignore[arg-type]

    def projx(self, x: Tensor) -> Tensor:
        """The point itself; outside or too close to the boundary for its dtype, the last point on its ray: (..., n).

        A sqrt c-scaled norm above 1 - 8 eps64 is brought to 1 - eps / 2 - 16 eps64. Rounding to the dtype multiplies a
        coordinate by at most 1 + eps / 2, and the float64 steps multiply the norm by less than 1 + 8 eps64: the result
        is inside, and projecting it again changes nothing.
        """
        limit, target = 1 - 8 * _EPS64, 1 - torch.finfo(x.dtype).eps / 2 - 16 * _EPS64

        def hold(x: Tensor) -> Tensor:
            wide = self._unit(x)
            norm = wide.norm(dim=-1, keepdim=True)
            outside = norm > limit
            inside = wide * (target / torch.where(outside, norm, 1.0))
            return torch.where(outside, self._restore(inside, x.dtype), x)

        return in_blocks(hold, x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Every vector is tangent to the ball: u, broadcast against x."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product of tangent vectors u, v at x (of u with itself without v): (...)."""
        v = u if v is None else v
        factor = 2 / poincare.gap(self._unit(x))
        product = poincare.dot(factor * u.double(), factor * v.double()).to(_dtype(x, u, v))
        return product if keepdim else product.squeeze(-1)

    def expmap(self, x: Tensor, u: Tensor, *, project: bool = True) -> Tensor:
        """The point reached in unit time from x with velocity u: (..., n); by `projx`, unless `project` is false."""
        y = self._map(poincare.exp, x, u)
        return self.projx(y) if project else y

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The velocity at x that reaches y in unit time: (..., n); Jacobian 1 at x = y = 0."""
        return self._map(poincare.log, x, y)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of v from x to y along the geodesic: (..., n)."""
        return self._map(poincare.transport, x, y, v)

    def midpoint(self, x: Tensor, y: Tensor) -> Tensor:
        """The middle of the geodesic from x to y: (..., n)."""
        return self.projx(self._map(poincare.midpoint, x, y))

    def frechet_mean(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The point of least weighted mean squared distance to x (..., N, n): (..., n); differentiable once.

        Args:
            weight: (..., N), not negative; equal without it.

        Raises:
            ValueError: a weight is negative or not finite, or all of a row are 0.
        """
        return self.projx(self._restore(poincare.frechet_mean(self._unit(x), _weights(x, weight)), x.dtype))


@dataclass(frozen=True)
class Lorentz(_Hyperbolic):
    """Lorentz model: points (..., n + 1), time first, with -t^2 + |u|^2 = -1/c and t > 0.

    Of points and tangent vectors only the spatial part is read: their time coordinate follows from it, and is computed
    in float64. So a point rounded off the hyperboloid does no harm, and gradients come with time part 0: those of the
    chart u. A tangent vector stored in float32 at radius r has norms good to eps e^r: keep r below 5 where its length
    matters, or hold it in the frame of `lorentz.to_frame`.

    Attributes:
        c: minus the curvature, a number, or a tensor of no dimensions to learn it.

    Raises:
        ValueError: c is not a positive finite number.
    """

    def _space(self, x: Tensor) -> Tensor:
        return self._unit(x[..., 1:])

    def _half(self, x: Tensor, y: Tensor) -> Tensor:
        if pairs.suits(x, y) and not isinstance(self.c, Tensor):
            return pairs.lorentz_half(x, y, math.sqrt(self.c))
        return in_blocks(lambda x, y: lorentz.half(self._space(x), self._space(y)), x, y)

    def _point(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        return self._restore(torch.cat([lorentz.time(u), u], -1), dtype)

    def _tangent(self, u: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        v = v.expand(torch.broadcast_shapes(u.shape, v.shape))
        return self._restore(torch.cat([poincare.dot(u, v) / lorentz.time(u), v], -1), dtype)

    def origin(
        self, *size: int | tuple[int, ...], dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """The origin (1 / sqrt c, 0, ..., 0), of this size."""
        zeros = torch.zeros(*size, dtype=dtype, device=device)  # type: ignore[arg-type]
        return self.projx(zeros)

    def projx(self, x: Tensor) -> Tensor:
        """The point with this spatial part: (..., n + 1)."""
        return self._point(self._space(x), x.dtype)

    def proju(self, x: Tensor, v: Tensor) -> Tensor:
        """Lorentz-orthogonal projection of an ambient vector v on the tangent space at x: (..., n + 1)."""
        u, wide = self._space(x), self._unit(v)
        product = poincare.dot(u, wide[..., 1:]) - lorentz.time(u) * wide[..., :1]
        return self._tangent(u, wide[..., 1:] + product * u, _dtype(x, v))

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Inner product of tangent vectors u, v at x (of u with itself without v): (...)."""
        v = u if v is None else v
        at = self._space(x)
        product = poincare.dot(lorentz.to_frame(at, u[..., 1:].double()), lorentz.to_frame(at, v[..., 1:].double()))
        product = product.to(_dtype(x, u, v))
        return product if keepdim else product.squeeze(-1)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The point reached in unit time from x with velocity u: (..., n + 1); inf beyond the dtype's range."""
        dtype = _dtype(x, u)
        return in_blocks(lambda x, u: self._point(lorentz.exp(self._space(x), self._space(u)), dtype), x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The velocity at x that reaches y in unit time: (..., n + 1)."""
        dtype = _dtype(x, y)

        def log(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
            at = self._space(x)
            return self._tangent(at, lorentz.log(at, self._space(y), h), dtype)

        return in_blocks(log, x, y, self._half(x, y))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of v from x to y along the geodesic: (..., n + 1)."""
        dtype = _dtype(x, y, v)

        def transport(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
            at = self._space(y)
            return self._tangent(at, lorentz.transport(self._space(x), at, self._space(v)), dtype)

        return in_blocks(transport, x, y, v)

    def midpoint(self, x: Tensor, y: Tensor) -> Tensor:
        """The middle of the geodesic from x to y: (..., n + 1)."""
        return self._point(lorentz.midpoint(self._space(x), self._space(y)), _dtype(x, y))

    def frechet_mean(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """As `PoincareBall.frechet_mean`, for x (..., N, n + 1), in the ball of float64: up to a radius of 30."""
        u = self._space(x)
        mean = poincare.frechet_mean(u / (1 + lorentz.time(u)), _weights(x, weight))
        return self._point(2 * mean / poincare.gap(mean), x.dtype)


def to_lorentz(x: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """The point of the Lorentz model for a point (..., n) of the ball of the same curvature: (..., n + 1)."""
    ball = PoincareBall(c)
    wide = ball._unit(x)
    return Lorentz(c)._point(2 * wide / poincare.gap(wide), x.dtype)


def to_ball(x: Tensor, c: float | Tensor = 1.0) -> Tensor:
    """The point of the ball for a point (..., n + 1) of the Lorentz model, by `PoincareBall.projx`: (..., n)."""
    model = Lorentz(c)
    u = model._space(x)
    return PoincareBall(c).projx(model._restore(u / (1 + lorentz.time(u)), x.dtype))


def _dtype(*tensors: Tensor) -> torch.dtype:
    return reduce(torch.promote_types, (t.dtype for t in tensors))


def _weights(x: Tensor, weight: Tensor | None) -> Tensor:
    """Weights of sum 1 in float64: (..., N)."""
    if weight is None:
        return torch.full(x.shape[:-1], 1 / x.shape[-2], dtype=torch.float64, device=x.device)
    total = weight.double().sum(-1, keepdim=True)
    if not bool((weight >= 0).all() and (total > 0).all() and total.isfinite().all()):
        raise ValueError("weights must be finite, not negative, and not all 0")
    return weight.double() / total
