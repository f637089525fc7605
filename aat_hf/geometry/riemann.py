"""Curvature and geodesics of any metric given as a function of the point, by automatic differentiation.

What a user of attention gets: how curved the space of attention rows, of query statistics, or of a metric of their
own is, and its shortest paths, without deriving a formula. The closed forms of this package (hyperbolic space, the
simplex, Gaussians) are checked against it. An analysis tool: third-order tensors, no use inside a model's forward.

A metric is a function from a point (n,) to a symmetric positive (or Lorentzian) matrix (n, n), written with torch
functions; points come in batches (..., n), one point at least. Everything is differentiable. Conventions of do Carmo
(1992, Riemannian Geometry, ch. 2-4) with the sign for which spheres are positive; indices in the order of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Metric = Callable[[Tensor], Tensor]


def _batched(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of single points and vectors (n,), over the broadcast batch of tensors (..., n)."""
    wide = torch.broadcast_tensors(*tensors)
    out = torch.func.vmap(function)(*(t.reshape(-1, t.shape[-1]) for t in wide))
    return out.reshape(*wide[0].shape[:-1], *out.shape[1:])


def _christoffel(metric: Metric, x: Tensor) -> Tensor:
    d = torch.func.jacfwd(metric)(x)  # d[m, j, i] = d_i g_mj
    lowered = (d.permute(0, 2, 1) + d - d.permute(2, 0, 1)) / 2  # [m, i, j] = (d_i g_mj + d_j g_mi - d_m g_ij) / 2
    n = x.shape[-1]
    # inv, not solve: the forward derivative of solve inside vmap is wrong in torch 2.13, without an error
    return (torch.linalg.inv(metric(x)) @ lowered.reshape(n, n * n)).reshape(n, n, n)


def _riemann(metric: Metric, x: Tensor) -> Tensor:
    gamma = _christoffel(metric, x)
    d = torch.func.jacfwd(lambda y: _christoffel(metric, y))(x)  # d[l, i, k, j] = d_j Gamma^l_ik
    one = d.permute(0, 1, 3, 2) + torch.einsum("ljm,mki->lijk", gamma, gamma)
    return one - one.transpose(2, 3)


def christoffel(metric: Metric, x: Tensor) -> Tensor:
    """Christoffel symbols Gamma^l_ij of the Levi-Civita connection at x (..., n): (..., n, n, n), [l, i, j]."""
    return _batched(lambda x: _christoffel(metric, x), x)


def riemann(metric: Metric, x: Tensor) -> Tensor:
    """Riemann tensor R^l_ijk at x (..., n): (..., n, n, n, n), [l, i, j, k].

    d_j Gamma^l_ik - d_k Gamma^l_ij + Gamma^l_jm Gamma^m_ki - Gamma^l_km Gamma^m_ji; lowering l on a space of constant
    curvature K gives K (g_lj g_ik - g_lk g_ij).
    """
    return _batched(lambda x: _riemann(metric, x), x)


def ricci(metric: Metric, x: Tensor) -> Tensor:
    """Ricci tensor R_ik = R^l_ilk at x (..., n): (..., n, n)."""
    return torch.einsum("...lilk->...ik", riemann(metric, x))


def scalar_curvature(metric: Metric, x: Tensor) -> Tensor:
    """Scalar curvature g^ik R_ik at x (..., n): (...)."""
    g = _batched(metric, x)
    return (torch.linalg.inv(g) @ ricci(metric, x)).diagonal(dim1=-2, dim2=-1).sum(-1)


def sectional_curvature(metric: Metric, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Gauss curvature of the geodesic surface at x through tangent vectors u and v, all (..., n): (...).

    Proportional u and v span no plane: NaN, or a number without meaning where rounding hides it.
    """

    def at(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        g = metric(x)
        turned = torch.einsum("lijk,i,j,k->l", _riemann(metric, x), v, u, v)
        area = (u @ g @ u) * (v @ g @ v) - (u @ g @ v) ** 2
        return (u @ g @ turned) / area

    return _batched(at, x, u, v)


@dataclass(frozen=True)
class RicciTensor:
    """The Ricci tensor of a metric as a field: `RicciTensor(metric)(x)` is `ricci(metric, x)`.

    Attributes:
        metric: from a point (n,) to a matrix (n, n).
    """

    metric: Metric

    def __call__(self, x: Tensor) -> Tensor:
        """The tensor at x (..., n): (..., n, n)."""
        return ricci(self.metric, x)

    def trace(self, x: Tensor) -> Tensor:
        """The scalar curvature at x (..., n): (...)."""
        return scalar_curvature(self.metric, x)

    def einstein(self, x: Tensor) -> Tensor:
        """R_ik - R g_ik / 2 at x (..., n): (..., n, n); divergence-free, 0 in two dimensions."""
        g = _batched(self.metric, x)
        tensor = self(x)
        trace = (torch.linalg.inv(g) @ tensor).diagonal(dim1=-2, dim2=-1).sum(-1)
        return tensor - trace[..., None, None] * g / 2


def geodesic(metric: Metric, x: Tensor, v: Tensor, steps: int = 100, time: float = 1.0) -> tuple[Tensor, Tensor]:
    """The geodesic from x with velocity v, by the classical Runge-Kutta method of fourth order with equal steps.

    Integrates x''^l = -Gamma^l_ij x'^i x'^j; the error falls with steps^-4, and g(x', x') staying constant along the
    path measures it.

    Args:
        metric: from a point (n,) to a matrix (n, n).
        x: (..., n), the start.
        v: (..., n), the velocity there, broadcast against x.
        steps: number of steps.
        time: how far to go; v is covered per unit.

    Returns:
        Points and velocities, each (steps + 1, ..., n).

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    x, v = torch.broadcast_tensors(x, v)
    h = time / steps

    def acceleration(x: Tensor, v: Tensor) -> Tensor:
        return -_batched(lambda x, v: torch.einsum("lij,i,j->l", _christoffel(metric, x), v, v), x, v)

    points, velocities = [x], [v]
    for _ in range(steps):
        v1, a1 = v, acceleration(x, v)
        v2, a2 = v + h / 2 * a1, acceleration(x + h / 2 * v1, v + h / 2 * a1)
        v3, a3 = v + h / 2 * a2, acceleration(x + h / 2 * v2, v + h / 2 * a2)
        v4, a4 = v + h * a3, acceleration(x + h * v3, v + h * a3)
        x = x + h / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        v = v + h / 6 * (a1 + 2 * a2 + 2 * a3 + a4)
        points.append(x)
        velocities.append(v)
    return torch.stack(points), torch.stack(velocities)
