"""The unit ball of curvature -1 in float64: the formulae behind `hyperbolic.PoincareBall`.

What a user of attention gets: scores and averages for models whose queries and keys live in hyperbolic space, right
to rounding from coincident points to the boundary. Everything is written with the gaps 1 - |x|^2 and the difference
y - x, so nothing cancels: h = sinh(d/2)^2 = |y - x|^2 / (gap(x) gap(y)) (Ungar 2008, Analytic Hyperbolic Geometry).

Shapes: points and tangent vectors (..., n), broadcast against each other; scalars keep a last dimension of 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.geometry import smooth

_HALF_ULP = 2.0**-53
_OUTSIDE = -(2.0**-40)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean inner product: (..., 1)."""
    return (x * y).sum(-1, keepdim=True)


def gap(x: Tensor) -> Tensor:
    """1 - |x|^2: (..., 1); NaN outside the ball.

    A point inside has a positive gap, but the computed one may be off by (n + 2) 2^-53 and then not be positive. It is
    raised to half an ulp of 1, within that error; the gradient stays -2 x. No point inside (up to n = 8000) comes out
    below -2^-40, so what does lies outside.
    """
    raw = 1 - dot(x, x)
    right = torch.where(raw < _OUTSIDE, torch.nan, raw.clamp(min=_HALF_ULP))
    return raw + (right - raw).detach()


def half(x: Tensor, y: Tensor) -> Tensor:
    """sinh(d(x, y) / 2)^2: (..., 1); 0 exactly where x equals y."""
    difference = y - x
    return dot(difference, difference) / (gap(x) * gap(y))


def exp(x: Tensor, v: Tensor) -> Tensor:
    """Exponential map, x + gap(x) (m + |m|^2 x) / (|x + m|^2 + gap(x) gap(m)): x (+) m of Ungar with its terms sorted.

    m is the tangent vector's end seen from x, tanh(|v| / gap(x)) v / |v|; the denominator is a sum of positive terms.
    """
    near = gap(x)
    scaled = v / near
    squared = dot(scaled, scaled)
    m = smooth.tanhc_sqrt(squared) * scaled
    denominator = dot(x + m, x + m) + near * smooth.sech_squared_sqrt(squared)
    return x + near * (m + dot(m, m) * x) / denominator


def log(x: Tensor, y: Tensor) -> Tensor:
    """Logarithm map: gap(x) d / sinh d ((y - x) / gap(y) - h x), the inverse of `exp`."""
    h = half(x, y)
    return gap(x) * smooth.asinh_ratio(h) * ((y - x) / gap(y) - h * x)


def transport(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Parallel transport of v from x to y along the geodesic: gyr[y, -x] v gap(y) / gap(x) (Ungar 2008, eq. 1.28).

    The gyration is expanded in e = y - x, so that it is the identity, exactly, at coincident points.
    """
    e = y - x
    ev, xv, xe, ee = dot(e, v), dot(x, v), dot(x, e), dot(e, e)
    near, far = gap(x), gap(y)
    along_x = near * ev - ee * xv
    along_e = -near * xv - dot(x, x) * ev + 2 * xe * xv
    turned = v + 2 * (along_x * x + along_e * e) / (ee + near * far)
    return turned * far / near


def midpoint(x: Tensor, y: Tensor) -> Tensor:
    """The middle of the geodesic: the normalised sum of the two points on the hyperboloid, seen in the ball."""
    gx, gy = gap(x), gap(y)
    both, e = gx * gy, y - x
    return (gy * x + gx * y) / (gx + gy - both + (both * (both + dot(e, e))).sqrt())


def centroid(x: Tensor, weight: Tensor) -> Tensor:
    """Normalised weighted mean on the hyperboloid (Law et al. 2019): x (..., N, n), weight (..., N) of sum 1: (..., n).

    The Lorentz norm of the mean is at least 1 (reversed Cauchy-Schwarz inequality), which is what the clamp says.
    """
    w = weight[..., None]
    factor = 2 / gap(x)
    space, time = (w * factor * x).sum(-2), (w * (factor - 1)).sum(-2)
    norm = ((time + space.norm(dim=-1, keepdim=True)) * (time - space.norm(dim=-1, keepdim=True))).clamp(min=1).sqrt()
    return space / (time + norm)


def _pull(mean: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted mean of the logarithms (..., n); the logarithms (..., N, n); d coth d of each point (..., N, 1)."""
    centre = mean[..., None, :]
    h = half(centre, x)
    logs = log(centre, x)
    return (weight[..., None] * logs).sum(-2), logs, smooth.asinh_ratio(h) * (1 + 2 * h)


def _newton(mean: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """One Newton step on the mean squared distance; differentiable in x and weight, `mean` being a constant.

    At the minimum its derivative is that of the implicit function theorem (Lou et al. 2020, Differentiating through
    the Frechet mean). The Hessian of d^2 / 2 is 1 along the geodesic and d coth d across it.
    """
    pull, logs, bend = _pull(mean, x, weight)
    with torch.no_grad():
        w = weight[..., None]
        squared = dot(logs, logs)
        excess = torch.where(squared == 0, 0.0, (bend - 1) / torch.where(squared == 0, 1.0, squared))
        across = (w * bend).sum(-2)[..., None] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        hessian = across - (w * excess * logs).mT @ logs
    return exp(mean, torch.linalg.solve(hessian, pull))


def frechet_mean(x: Tensor, weight: Tensor, tolerance: float = 1e-10, steps: int = 2000) -> Tensor:
    """The point of least weighted mean squared distance: x (..., N, n), weight (..., N) of sum 1: (..., n).

    Each step minimises an upper bound of the objective: arccosh^2 is concave, so the bound is linear on the
    hyperboloid and its minimum is a centroid (Lou et al. 2020, algorithm 1), here written in the tangent space of the
    last point. The objective never grows, from any start.

    Raises:
        RuntimeError: more than `steps` steps (points thousands of units apart).
    """
    with torch.no_grad():
        mean = centroid(x, weight)
        for _ in range(steps):
            pull, _, bend = _pull(mean, x, weight)
            mean_bend = (weight[..., None] * bend).sum(-2)
            length = 2 * pull.norm(dim=-1, keepdim=True) / gap(mean)
            ratio = length / mean_bend  # < 1, since d < d coth d
            if not (ratio > tolerance).any():
                break
            stretch = torch.where(ratio == 0, 1.0, ratio.atanh() / torch.where(ratio == 0, 1.0, ratio))
            mean = exp(mean, pull * stretch / mean_bend)
        else:
            raise RuntimeError(f"the Frechet mean has not converged in {steps} steps")
    return _newton(mean, x, weight)
