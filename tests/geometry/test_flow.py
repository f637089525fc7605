from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from aat_hf.geometry.fisher import gaussian_metric
from aat_hf.geometry.flow import FlowSingularityError, integrate, ricci_flow, volume


def ball(sign: float):
    """Sphere (1) or hyperbolic space (-1) with squared radius theta, in stereographic coordinates."""

    def metric(theta: Tensor, x: Tensor) -> Tensor:
        return theta[0] * (2 / (1 + sign * (x * x).sum())) ** 2 * torch.eye(len(x), dtype=x.dtype)

    return metric


def two_spheres(theta: Tensor, x: Tensor) -> Tensor:
    return torch.block_diag(ball(1.0)(theta[:1], x[:2]), ball(1.0)(theta[1:], x[2:]))


def cigar(theta: Tensor, x: Tensor) -> Tensor:
    """Hamilton's soliton: stays of this form with theta = theta0 e^{4 t}."""
    return torch.eye(2, dtype=x.dtype) / (theta[0] + (x * x).sum())


@pytest.mark.parametrize(("sign", "n"), [(1.0, 2), (1.0, 3), (-1.0, 2), (-1.0, 3)])
def test_radius_law(sign, n):
    points = 0.3 * torch.randn(2, n)
    time = 0.08
    found = ricci_flow(ball(sign), torch.tensor([4.0]), points, time)
    assert found.item() == pytest.approx(4 - sign * 2 * (n - 1) * time, rel=1e-12)


def test_a_gaussian_family_grows_by_its_curvature():
    found = ricci_flow(
        lambda theta, x: theta[0] * gaussian_metric(x), torch.ones(1), torch.tensor([[0.3, 1.2], [-1.0, 0.7]]), 0.1
    )
    assert found.item() == pytest.approx(1.1, rel=1e-12)  # dg/dt = -2 K g with K = -1/2 / theta


def test_cigar_soliton():
    found = ricci_flow(cigar, torch.ones(1), torch.randn(3, 2), 0.1)
    assert found.item() == pytest.approx(math.exp(0.4), rel=1e-8)


def test_the_normalised_flow_keeps_the_volume():
    points = 0.3 * torch.randn(2, 4)
    start = torch.tensor([1.0, 1.5])
    end = ricci_flow(two_spheres, start, points, 0.02, normalised=True)
    before, after = (volume(two_spheres, theta, points, torch.ones(2)) for theta in (start, end))
    assert after.item() == pytest.approx(before.item(), rel=1e-9)
    assert end[1] - end[0] > 0.505  # d ln theta / dt = -2 / theta + r / 2: the product of unequal spheres is unstable
    still = ricci_flow(ball(1.0), torch.tensor([2.0]), points[:, :3], 5.0, normalised=True)
    assert still.item() == pytest.approx(2.0, rel=1e-12)


def test_the_flow_is_differentiable():
    start = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    found = ricci_flow(cigar, start, torch.randn(2, 2), 0.02)
    (slope,) = torch.autograd.grad(found.sum(), start)
    assert slope.item() == pytest.approx(math.exp(0.08), rel=1e-8)


def test_collapse_is_an_error_that_names_the_time():
    with pytest.raises(FlowSingularityError, match="collapses") as caught:
        ricci_flow(ball(1.0), torch.tensor([4.0]), 0.3 * torch.randn(1, 2), 2000.0)
    assert 0 <= caught.value.time < 2


def test_leaving_the_family_is_an_error():
    with pytest.raises(ValueError, match="leaves the family"):
        ricci_flow(lambda theta, x: theta[0] * (2 + x.sin()[0]) * torch.eye(2), torch.ones(1), torch.randn(4, 2), 0.1)


@pytest.mark.parametrize("time", [-1.0, math.inf, math.nan])
def test_bad_times_are_errors(time):
    with pytest.raises(ValueError, match="finite and not negative"):
        integrate(lambda x: x, torch.ones(1), time, lambda x, rate: 1.0)


def test_the_integrator_has_order_four_and_reports_blow_up():
    exact = np.exp(1.0)
    errors = [
        float(integrate(lambda x: x, torch.ones(1).double(), 1.0, lambda x, r, h=h: h)) - exact for h in (0.1, 0.05)
    ]
    assert 14 < errors[0] / errors[1] < 18
    with pytest.raises(FlowSingularityError, match=r"near t = 0\.99"):  # x' = x^2 is infinite at t = 1
        integrate(lambda x: x * x, torch.ones(1).double(), 2.0, lambda x, rate: float(0.05 * x / rate))
    with pytest.raises(FlowSingularityError):
        integrate(lambda x: x * math.nan, torch.ones(1), 1.0, lambda x, rate: float(rate))
