"""Information geometry: the probability simplex, softmax and key tiles, Gaussian families.

What a user of attention gets: how far apart two attention rows are (Fisher-Rao distance, 2 arccos of the root of the
kept mass when tiles are dropped), the path between them, and the metric that tells how much a key tile changes with
the query: the covariance of its keys, which tile selection sums up.

Everything on the simplex goes through p -> 2 sqrt p, an isometry on the sphere of radius 2 (Amari & Nagaoka 2000,
Methods of Information Geometry, ch. 2; Kass & Vos 1997, sec. 7.4). Distances and maps are computed in float64 and
returned in the inputs' dtype. Distances are in radians of that sphere: from 0 to pi. A row that sees no key, all of it
0 or -inf, gives NaN and has the gradient 0, so that it can be masked out of a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aat_hf.geometry import smooth
from aat_hf.geometry.blocks import in_blocks


def _root(p: Tensor) -> Tensor:
    """Unit vector sqrt(p / sum p), float64; gradient 0 where p is 0; 0 for a row of zeros."""
    wide = p.double()
    total = wide.sum(-1, keepdim=True)
    return smooth.positive_sqrt(wide / torch.where(total == 0, 1.0, total))


def _root_of_softmax(s: Tensor) -> Tensor:
    """Unit vector sqrt(softmax(s)), float64; 0 for a row of -inf."""
    highest = s.detach().amax(-1, keepdim=True)
    root = torch.exp((s.double() - highest.masked_fill(highest == -torch.inf, 0.0)) / 2)
    square = _dot(root, root)
    return root * torch.where(square == 0, 1.0, square).rsqrt()


def _known(value: Tensor, *roots: Tensor) -> Tensor:
    """`value` (..., n or 1), NaN where one of the roots (..., n) is 0: a constant, which blocks the gradient."""
    for root in roots:
        value = torch.where(root.detach().amax(-1, keepdim=True) > 0, value, torch.nan)
    return value


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _chord(a: Tensor, b: Tensor) -> Tensor:
    """sin(theta / 2)^2 of the angle between unit vectors, from their difference: exact near 0; (..., 1), at most 1/2.

    Between vectors without negative entries the angle is at most pi / 2; the clamp only takes off rounding.
    """
    return (_dot(a - b, a - b) / 4).clamp(max=0.5)


def _distance(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    less, more = (_dot(x, x) for x in (a - b, a + b))
    angle = torch.atan2(smooth.positive_sqrt(less), smooth.positive_sqrt(more))
    both = (less + more).detach() > 3  # twice the sum of their squares, 4 for unit vectors
    return torch.where(both, 4 * angle, torch.nan).to(dtype)


def distance(p: Tensor, r: Tensor) -> Tensor:
    """Fisher-Rao distance 2 arccos sum sqrt(p r) of rows of probabilities (..., n): (...), 0 exactly for p = r.

    Computed as 4 atan2(|sqrt p - sqrt r|, |sqrt p + sqrt r|). Rows are normalised first. Zeros are allowed; there, as
    at p = r, the gradient is set to 0 (the true one is infinite, resp. undefined).
    """
    dtype = torch.promote_types(p.dtype, r.dtype)
    return in_blocks(lambda p, r: _distance(_root(p), _root(r), dtype), p, r).squeeze(-1)


def distance_logits(s: Tensor, t: Tensor) -> Tensor:
    """`distance` of softmax(s) and softmax(t) (..., n): (...); -inf is allowed, and every gradient is finite."""
    dtype = torch.promote_types(s.dtype, t.dtype)

    def of_logits(s: Tensor, t: Tensor) -> Tensor:
        return _distance(_root_of_softmax(s), _root_of_softmax(t), dtype)

    return in_blocks(of_logits, s, t).squeeze(-1)


def distance2(p: Tensor, r: Tensor) -> Tensor:
    """Squared Fisher-Rao distance: (...); smooth at p = r."""
    dtype = torch.promote_types(p.dtype, r.dtype)

    def squared(p: Tensor, r: Tensor) -> Tensor:
        a, b = _root(p), _root(r)
        return _known(16 * smooth.arcsin_squared(_chord(a, b)), a, b).to(dtype)

    return in_blocks(squared, p, r).squeeze(-1)


def inner(p: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
    """Fisher inner product sum u v / p of tangent vectors (sum 0; 0 where p is 0) at p (..., n): (...)."""
    v = u if v is None else v
    inside = p > 0
    terms = torch.where(inside, u.double() * v.double() / torch.where(inside, p, 1.0), 0.0)
    return terms.sum(-1).to(torch.promote_types(p.dtype, torch.promote_types(u.dtype, v.dtype)))


def geodesic(p: Tensor, r: Tensor, t: float | Tensor) -> Tensor:
    """The point at time t of the geodesic from p (t = 0) to r (t = 1), at constant speed: (..., n).

    Args:
        t: a number, or a tensor broadcast against (...).
    """
    dtype = torch.promote_types(p.dtype, r.dtype)
    a, b = _root(p), _root(r)
    time = torch.as_tensor(t, dtype=torch.float64, device=p.device)[..., None]
    squared = 4 * smooth.arcsin_squared(_chord(a, b))  # theta^2
    sinc = smooth.sinc_sqrt(squared)
    from_a = (1 - time) * smooth.sinc_sqrt((1 - time) ** 2 * squared) / sinc
    from_b = time * smooth.sinc_sqrt(time**2 * squared) / sinc
    return _known((from_a * a + from_b * b).square(), a, b).to(dtype)


def midpoint(p: Tensor, r: Tensor) -> Tensor:
    """The middle of the geodesic: the square of the normalised sqrt p + sqrt r: (..., n)."""
    a, b = _root(p), _root(r)
    total = a + b
    square = _dot(total, total)
    middle = total.square() / torch.where(square == 0, 1.0, square)
    return _known(middle, a, b).to(torch.promote_types(p.dtype, r.dtype))


def expmap(p: Tensor, v: Tensor) -> Tensor:
    """The point reached in unit time from p with velocity v (sum 0; 0 where p is 0): (..., n).

    cos|w| sqrt p + sin|w| / |w| w with w = v / (2 sqrt p), squared. A geodesic that meets the boundary of the simplex
    is reflected there, as that of the sphere is folded on its positive orthant.
    """
    a = _root(p)
    inside = a > 0
    w = torch.where(inside, v.double() / (2 * torch.where(inside, a, 1.0)), 0.0)
    squared = _dot(w, w)
    psi = smooth.cos_sqrt(squared) * a + smooth.sinc_sqrt(squared) * w
    return _known(psi.square(), a).to(torch.promote_types(p.dtype, v.dtype))


def logmap(p: Tensor, r: Tensor) -> Tensor:
    """The velocity at p that reaches r in unit time: (..., n), of sum 0.

    2 sqrt p theta / sin theta (sqrt r - cos theta sqrt p), with cos theta = 1 - 2 chord. Where p is 0 no velocity
    leads inside (the metric is infinite there), and the result is 0: the map inverts `expmap` for p > 0.
    """
    a, b = _root(p), _root(r)
    chord = _chord(a, b)
    v = 2 * a * smooth.arcsin_ratio(chord) * ((b - a) + 2 * chord * a)
    return _known(v, a, b).to(torch.promote_types(p.dtype, r.dtype))


def softmax_metric(p: Tensor) -> Tensor:
    """Fisher metric of softmax in its logits, diag(p) - p p', at probabilities p (..., n): (..., n, n).

    Positive semidefinite: adding a constant to the logits changes nothing.
    """
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def exponential_family_metric(log_partition: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Fisher metric of an exponential family: the Hessian of its log-partition at theta (..., d): (..., d, d).

    Args:
        log_partition: from (d,) to a number, written with torch functions.
    """
    hessian = torch.func.vmap(torch.func.hessian(log_partition))(theta.reshape(-1, theta.shape[-1]))
    return hessian.reshape(*theta.shape, theta.shape[-1])


def tile_metric(k: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the keys of a tile: gradient and Fisher metric of its log-partition in the query.

    For scores q.k the log-partition ln sum_j weight_j exp(q.k_j) has these derivatives at q = 0; at another q pass
    the attention within the tile, softmax(q.k), as the weight. Computed in float32 or wider, deviations first, so
    that a vector added to all keys does not touch the covariance.

    Of keys and values side by side, k = [keys, values] (..., n, d + e), the block `covariance[..., d:, :d]` holds their
    cross moments: the derivative of the tile's output sum_j p_j v_j in the query.

    Args:
        k: (..., n, d) keys.
        weight: (..., n), not negative, or booleans: which keys exist; all alike without it. Only its ratios count.

    Returns:
        mean (..., d) and covariance (..., d, d), population form; both 0 for a tile without weight.
    """
    x = k.to(torch.promote_types(k.dtype, torch.float32))
    w = x.new_ones(x.shape[:-1]) if weight is None else weight.to(x.dtype).expand(x.shape[:-1])
    total = w.sum(-1, keepdim=True)
    w = (w / torch.where(total == 0, 1.0, total))[..., None]
    x = torch.where(w == 0, 0.0, x)  # whatever a key that does not exist holds
    mean = (w * x).sum(-2)
    centred = x - mean[..., None, :]
    return mean, (w * centred).mT @ centred


def merge_tile_metrics(weight: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """`tile_metric` of a union from those of disjoint parts, in any order and grouping (Chan, Golub & LeVeque 1983).

    Args:
        weight: (..., parts), number or total weight of the keys of each; a part without weight counts for nothing.
        mean: (..., parts, d).
        covariance: (..., parts, d, d), population form.

    Returns:
        mean (..., d) and covariance (..., d, d), whose weight is the sum; both 0 without weight.
    """
    weight = weight.to(covariance)  # a quotient of integers would be float32
    total = weight.sum(-1, keepdim=True)
    share = (weight / torch.where(total == 0, 1.0, total))[..., None, None]
    mean_of_all, between = tile_metric(mean, weight)
    return mean_of_all, (share * covariance).sum(-3) + between


def diagonal_tile_metric(k: Tensor, exists: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the keys of a tile and the diagonal of its Fisher metric, as in `tile_metric`, in O(n d).

    Args:
        k: (..., n, d), float32 or wider, 0 where a key does not exist.
        exists: (..., n) booleans, broadcast; all do without it.

    Returns:
        mean and variance, both (..., d); 0 for a tile without keys.
    """
    count = k.shape[-2] if exists is None else exists.sum(-1).clamp(min=1)[..., None]
    mean = k.sum(-2) / count
    centred = k - mean[..., None, :]
    if exists is not None:
        centred = centred * exists[..., None]
    return mean, centred.square().sum(-2) / count


def natural_gradient(metric: Tensor, gradient: Tensor, damping: float = 0.0) -> Tensor:
    """The steepest direction of the metric, (metric + damping)^-1 gradient (Amari 1998): (..., d).

    Without damping, the solution of least norm: directions that change nothing (a constant added to all logits) get
    no step. The pseudo-inverse drops eigenvalues below d eps times the largest.

    Args:
        metric: (..., d, d), symmetric positive semidefinite.
        gradient: (..., d).
        damping: added to the diagonal.

    Raises:
        ValueError: negative damping.
        torch.linalg.LinAlgError: the damped metric is not positive definite.
    """
    if damping < 0:
        raise ValueError(f"damping must not be negative, got {damping}")
    if damping == 0:
        return (torch.linalg.pinv(metric, hermitian=True) @ gradient[..., None])[..., 0]
    identity = torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)
    factor = torch.linalg.cholesky(metric + damping * identity)
    return torch.cholesky_solve(gradient[..., None], factor)[..., 0]


def gaussian_metric(point: Tensor) -> Tensor:
    """Fisher metric diag(1, 2) / sigma^2 of univariate Gaussians at (mean, sigma) (..., 2): (..., 2, 2)."""
    sigma = point[..., 1:]
    return torch.diag_embed(torch.cat([sigma**-2, 2 * sigma**-2], -1))


def gaussian_distance(mean: Tensor, sigma: Tensor, other_mean: Tensor, other_sigma: Tensor) -> Tensor:
    """Fisher-Rao distance of diagonal Gaussians, means and standard deviations (..., d): (...).

    Each coordinate is a hyperbolic half-plane of curvature -1/2 (Costa, Santos & Strapasson 2015, eq. 8): the distance
    is 2 sqrt 2 asinh sqrt h with h = ((dmean)^2 / 2 + (dsigma)^2) / (4 sigma sigma'), and independent coordinates add
    their squares. 0 exactly, with gradient 0, for equal Gaussians. For one variable pass d = 1.
    """
    dtype = torch.promote_types(mean.dtype, other_mean.dtype)
    m, s, n, t = (x.double() for x in (mean, sigma, other_mean, other_sigma))
    h = (((m - n) / s) * ((m - n) / t) / 2 + ((s - t) / s) * ((s - t) / t)) / 4
    return smooth.positive_sqrt(8 * smooth.asinh_squared(h).sum(-1)).to(dtype)
