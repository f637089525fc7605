"""What keeps lengths: parallel transport, rotations, conversions between the models."""

from __future__ import annotations

import math

import pytest
import torch
from hyperbolic_points import MODELS, directions, point

from aat_hf.geometry import Lorentz, PoincareBall, to_ball, to_lorentz


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("c", [0.5, 1.0])
def test_transport_keeps_inner_products_and_returns(kind, c):
    model = kind(c)
    x, y = (point(model, directions(20, 5), 3 * torch.rand(20)) for _ in range(2))
    v, w = (model.proju(x, torch.randn_like(x)) for _ in range(2))
    moved, other = model.transp(x, y, v), model.transp(x, y, w)
    assert torch.allclose(model.inner(y, moved, other), model.inner(x, v, w), rtol=1e-10, atol=1e-12)
    assert torch.allclose(model.transp(y, x, moved), v, atol=1e-10)
    assert torch.allclose(model.transp(x, x, v), v, rtol=1e-15, atol=1e-15)
    # a geodesic carries its own velocity: log_y(x) = -T log_x(y)
    assert torch.allclose(model.transp(x, y, model.logmap(x, y)), -model.logmap(y, x), atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("radius", [0.0, 1.0, 3.0, 5.0])
def test_transport_in_float32_keeps_norms_up_to_the_rounding_of_far_points(kind, radius):
    model = kind(1.0)
    x, y = (point(model, directions(200, 4), radius, torch.float32) for _ in range(2))
    v = model.proju(x, torch.randn_like(x))
    moved = model.transp(x, y, v)
    assert moved.dtype == torch.float32
    before, after = (model.inner(at.double(), w.double()).sqrt() for at, w in ((x, v), (y, moved)))
    assert (after / before - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps * math.exp(2 * radius)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_rotating_both_points_changes_no_distance(kind, dtype, tolerance):
    model = kind(0.6)
    x, y = (point(model, directions(30, 4), 2 * torch.rand(30)) for _ in range(2))
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    if kind is Lorentz:
        turn = torch.block_diag(torch.ones(1, 1).double(), turn)
    x, y, far, away = (t.to(dtype) for t in (x, y, x @ turn, y @ turn))
    assert torch.allclose(model.dist(far, away), model.dist(x, y), rtol=tolerance)


def test_conversions_keep_distances_and_return():
    for c in (0.25, 1.0, 4.0):
        ball, hyperboloid = PoincareBall(c), Lorentz(c)
        x, y = (point(ball, directions(30, 4), 6 * torch.rand(30)) for _ in range(2))
        lifted, other = to_lorentz(x, c), to_lorentz(y, c)
        on = -(lifted[..., 0] ** 2) + lifted[..., 1:].square().sum(-1)
        assert torch.allclose(on, torch.full((30,), -1 / c).double(), rtol=1e-5)  # a difference of squares
        assert torch.allclose(ball.dist(x, y), hyperboloid.dist(lifted, other), rtol=1e-10)
        assert torch.allclose(to_ball(lifted, c), x, rtol=1e-14, atol=1e-16)
        assert torch.equal(to_lorentz(ball.origin(2, 3), c), hyperboloid.origin(2, 4))
