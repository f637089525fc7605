"""Ricci flow of a family of metrics: dg/dt = -2 Ric(g), by automatic differentiation.

What a user of attention gets: how a metric of their own (of query statistics, of a learned geometry) evens out, and
where it collapses, without deriving an equation. An analysis tool, no use inside a model's forward. Surfaces whose
metric is a field on a grid are in `surfaces`, graphs of tiles in `tile_graph`.

A family is a function of parameters (p,) and a point (n,) that gives the metric there, (n, n): a round sphere with its
squared radius, a homogeneous space with its scale factors, a soliton. If the flow does not leave the family it is an
ordinary differential equation of the parameters, integrated by the classical Runge-Kutta method in float64.

Source: R. S. Hamilton, *Three-manifolds with positive Ricci curvature*, J. Differential Geom. 17 (1982), sections 1, 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aat_hf.geometry.riemann import ricci

Family = Callable[[Tensor, Tensor], Tensor]

_CHANGE = 0.015  # of the metric in one step: the error of a step is of its fifth power
_COLLAPSED = 1e-4  # of the time asked for: where steps are shorter, a singularity is about as near
_CLOSED = 1e-6  # relative residual from which a family counts as left by the flow


class FlowSingularityError(ArithmeticError):
    """A flow came to a point where the metric collapses or blows up.

    Attributes:
        time: the last time at which it was still regular.
    """

    def __init__(self, message: str, time: float) -> None:
        super().__init__(message)
        self.time = time


def integrate(
    rate: Callable[[Tensor], Tensor],
    state: Tensor,
    time: float,
    step_limit: Callable[[Tensor, Tensor], float],
    max_steps: int = 100_000,
) -> Tensor:
    """`state` after `time` under d state / dt = rate(state): classical Runge-Kutta steps, differentiable.

    Args:
        step_limit: from a state and its rate to the longest step that is stable and accurate there.

    Raises:
        ValueError: a negative or infinite time.
        FlowSingularityError: the steps shrink to nothing, or more than `max_steps` are needed.
    """
    if not 0 <= time < float("inf"):
        raise ValueError(f"time = {time}: must be finite and not negative")
    now = 0.0
    for _ in range(max_steps):
        if now >= time:
            return state
        k1 = rate(state)
        step = min(step_limit(state.detach(), k1.detach()), time - now)
        if not step > min(_COLLAPSED * time, time - now) / 2:  # NaN included
            break
        k2 = rate(state + step / 2 * k1)
        k3 = rate(state + step / 2 * k2)
        k4 = rate(state + step * k3)
        state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        now = time if step == time - now else now + step
    if now >= time:
        return state
    raise FlowSingularityError(
        f"the metric collapses or blows up near t = {now:.6g}, before t = {time:.6g}: ask for a shorter time",
        now,
    )


def ricci_flow(
    family: Family,
    parameters: Tensor,
    points: Tensor,
    time: float,
    normalised: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """Parameters of the metric after `time` under Ricci flow: (p,) float64.

    Steps are so short that the metric changes by at most 1.5 percent in one. The normalised flow adds 2 r g / n, with r
    the mean scalar curvature over the volume, and keeps the volume.

    Args:
        family: from parameters (p,) and a point (n,) to the metric (n, n), written with torch functions.
        parameters: (p,), where the flow starts.
        points: (m, n), where dg/dt is matched; enough of them to tell the parameters apart.
        normalised: whether to keep the volume.
        weights: (m,) quadrature weights of the points in the coordinates, for the mean; equal by default, which is
            exact on homogeneous spaces.

    Raises:
        ValueError: the flow leaves the family.
        FlowSingularityError: the metric collapses before `time`.
    """
    wide = points.double()
    share = torch.ones_like(wide[:, 0]) if weights is None else weights.to(wide)

    def rate(theta: Tensor) -> Tensor:
        return _parameter_rate(family, theta, wide, share if normalised else None)

    def step_limit(theta: Tensor, slope: Tensor) -> float:
        g, change, *_ = torch.func.jvp(lambda theta: _metrics(family, theta, wide), (theta,), (slope,))
        fastest = float(torch.linalg.matrix_norm(torch.linalg.solve(g, change)).max())
        return float("inf") if fastest == 0 else _CHANGE / fastest

    return integrate(rate, parameters.double(), time, step_limit)


def volume(family: Family, parameters: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Volume sum_k weights_k sqrt(det g(points_k)): (); points (m, n), weights (m,) of a rule in the coordinates."""
    return (weights.double() * torch.linalg.det(_metrics(family, parameters.double(), points.double())).sqrt()).sum()


def _metrics(family: Family, theta: Tensor, points: Tensor) -> Tensor:
    return torch.func.vmap(family, (None, 0))(theta, points)


def _ricci(family: Family, theta: Tensor, points: Tensor) -> Tensor:
    return ricci(lambda x: family(theta, x), points)


def _parameter_rate(family: Family, theta: Tensor, points: Tensor, share: Tensor | None) -> Tensor:
    """d theta / dt whose dg/dt is the flow's: least squares over the points; `share` for the normalised flow."""
    g, curvature = _metrics(family, theta, points), _ricci(family, theta, points)
    wanted = -2 * curvature
    if share is not None:
        density = share * torch.linalg.det(g).sqrt()
        scalar = torch.linalg.solve(g, curvature).diagonal(dim1=-2, dim2=-1).sum(-1)
        wanted = wanted + 2 / g.shape[-1] * (density * scalar).sum() / density.sum() * g
    slope = torch.func.jacfwd(lambda theta: _metrics(family, theta, points))(theta).flatten(0, 2)  # [m n n, p]
    found = torch.linalg.pinv(slope) @ wanted.flatten()
    residual = torch.linalg.vector_norm(slope @ found - wanted.flatten()).detach()
    scale = torch.linalg.vector_norm(curvature).detach() + torch.linalg.vector_norm(wanted).detach()
    if residual > _CLOSED * scale:
        raise ValueError(
            f"the flow leaves the family: {float(residual / scale):.1e} of dg/dt is no change of its parameters; "
            "add parameters that allow it"
        )
    return found
