from __future__ import annotations

import math

import pytest
import torch
from mpmath import mp, mpf
from oracles import dot
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from aat_hf.geometry import Lorentz, PoincareBall, poincare, smooth

MODELS = [PoincareBall, Lorentz]
PLACES = ["apart", "coincident", "origin", "both at the origin", "near", "far"]


def pair(model, place: str) -> tuple[Tensor, Tensor]:
    x, y = 0.4 * torch.randn(2, 3, 4, dtype=torch.float64).clamp(-1, 1)
    if place == "coincident":
        y = x.clone()
    elif place == "origin":
        x = torch.zeros_like(x)
    elif place == "both at the origin":
        x = y = torch.zeros_like(x)
    elif place == "near":
        y = x + 1e-4 * torch.randn_like(x)
    elif place == "far" and isinstance(model, PoincareBall):
        x, y = 0.9 * x / x.norm(dim=-1, keepdim=True), 0.95 * y / y.norm(dim=-1, keepdim=True)
    elif place == "far":
        x, y = 10 * x, 20 * y
    return x.clone().requires_grad_(True), y.clone().requires_grad_(True)


def on(model, u: Tensor) -> Tensor:
    """The point for free coordinates."""
    return u if isinstance(model, PoincareBall) else model.projx(torch.cat([u[..., :1], u], -1))


def tangent(model, x: Tensor, v: Tensor) -> Tensor:
    return v if isinstance(model, PoincareBall) else model.proju(x, torch.cat([v[..., :1], v], -1))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", PLACES)
def test_gradcheck(kind, place):
    model = kind(1.3 if kind is Lorentz else 1.0)
    x, y = pair(model, place)
    v = (0.3 * torch.randn_like(x)).requires_grad_(True)
    assert gradcheck(lambda x, y: model.dist2(on(model, x), on(model, y)), (x, y))
    assert gradcheck(
        lambda x, y: model.logmap(on(model, x), on(model, y)), (x, y), atol=1e-4 if place == "far" else 1e-5
    )
    assert gradcheck(lambda x, y: model.midpoint(on(model, x), on(model, y)), (x, y))
    assert gradcheck(lambda x, v: model.expmap(on(model, x), tangent(model, on(model, x), v)), (x, v))
    assert gradcheck(
        lambda x, y, v: model.transp(on(model, x), on(model, y), tangent(model, on(model, x), v)), (x, y, v)
    )
    if place in ("apart", "origin", "far"):
        assert gradcheck(lambda x, y: model.dist(on(model, x), on(model, y)), (x, y))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("place", ["apart", "coincident", "both at the origin"])
def test_second_derivatives(kind, place):
    model = kind(1.0)
    x, y = (t[:1].detach().requires_grad_(True) for t in pair(model, place))
    assert gradgradcheck(lambda x, y: model.dist2(on(model, x), on(model, y)), (x, y))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_zero_velocity_exp_has_the_identity_as_its_derivative(kind, dtype):
    model = kind(1.0)
    u = torch.zeros(3, dtype=dtype)
    start = model.origin(3, dtype=dtype) if kind is PoincareBall else model.origin(4, dtype=dtype)
    jacobian = torch.func.jacrev(lambda v: model.expmap(start, tangent(model, start, v))[..., -3:])(u)
    assert torch.equal(jacobian, torch.eye(3, dtype=dtype))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_logarithm_at_the_origin_has_the_identity_as_its_jacobian(kind, dtype):
    model = kind(1.0)
    start = model.origin(3, dtype=dtype) if kind is PoincareBall else model.origin(4, dtype=dtype)
    u = torch.zeros(3, dtype=dtype)
    for jacobian_of in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = jacobian_of(lambda y: model.logmap(start, on(model, y))[..., -3:])(u)
        assert torch.equal(jacobian, torch.eye(3, dtype=dtype))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distance_at_coincident_points_has_gradient_zero(kind, dtype):
    model = kind(1.0)
    for u in (torch.zeros(5, 3, dtype=dtype), 0.3 * torch.randn(5, 3, dtype=dtype)):
        x = on(model, u).detach().requires_grad_(True)
        y = on(model, u).detach().requires_grad_(True)
        for distance in (model.dist, model.dist2):
            for gradient in torch.autograd.grad(distance(x, y).sum(), (x, y)):
                assert torch.equal(gradient, torch.zeros_like(gradient))


def test_hessian_of_the_squared_distance_at_coincident_points_is_twice_the_metric():
    ball = PoincareBall(1.0)
    x = torch.tensor([0.3, -0.2, 0.5]).double()
    hessian = torch.func.hessian(lambda y: ball.dist2(x, y))(x)
    metric = (2 / (1 - x.square().sum())) ** 2 * torch.eye(3).double()
    assert torch.allclose(hessian, 2 * metric, rtol=1e-12)


def test_gradient_of_the_squared_distance_is_the_logarithm():
    ball = PoincareBall(0.6)
    x, y = 0.5 * torch.randn(2, 20, 3).double().clamp(-1, 1)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(ball.dist2(x, y).sum(), x)
    factor = 2 / (1 - 0.6 * x.square().sum(-1, keepdim=True))
    assert torch.allclose(gradient / factor**2, -2 * ball.logmap(x, y), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_1e_6_from_the_boundary_against_60_digits(dtype):
    ball = PoincareBall(1.0)
    x = torch.tensor([0.6, 0.8]) * (1 - 1e-6)
    for y in (torch.tensor([0.0, 0.0]), torch.tensor([0.8, -0.6]) * (1 - 1e-6), torch.tensor([0.6, 0.8]) * (1 - 2e-6)):
        a, b = x.to(dtype).requires_grad_(True), y.to(dtype)
        (gradient,) = torch.autograd.grad(ball.dist(a, b), a)
        p, q = ([mpf(float(v)) for v in t.detach()] for t in (a, b))

        def distance(s, t, q=q):
            e = [s - q[0], t - q[1]]
            return mp.acosh(1 + 2 * dot(e, e) / ((1 - s * s - t * t) * (1 - dot(q, q))))

        exact = [mp.diff(distance, tuple(p), order, h=mpf(10) ** -25) for order in ((1, 0), (0, 1))]
        scale = max(abs(float(e)) for e in exact)
        for found, right in zip(gradient, exact, strict=True):
            assert abs(float(found) - float(right)) <= (1e-6 if dtype == torch.float32 else 1e-9) * scale


@pytest.mark.parametrize("kind", MODELS)
def test_batch_equals_single_and_vmap(kind):
    model = kind(1.0)
    x, y = (on(model, 0.4 * torch.randn(6, 3)) for _ in range(2))
    mapped = torch.func.vmap(model.dist)(x, y)
    single = torch.stack([model.dist(a, b) for a, b in zip(x, y, strict=True)])
    assert torch.equal(model.dist(x, y), single) and torch.equal(mapped, single)
    table = model.dist(x[:, None], y[None])
    assert table.shape == (6, 6) and torch.equal(table.diagonal(), single)


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (smooth.cosh_sqrt, lambda t: mp.cosh(mp.sqrt(t))),
        (smooth.sinhc_sqrt, lambda t: mp.sinh(mp.sqrt(t)) / mp.sqrt(t)),
        (smooth.tanhc_sqrt, lambda t: mp.tanh(mp.sqrt(t)) / mp.sqrt(t)),
        (smooth.sech_squared_sqrt, lambda t: mp.sech(mp.sqrt(t)) ** 2),
        (smooth.cos_sqrt, lambda t: mp.cos(mp.sqrt(t))),
        (smooth.sinc_sqrt, lambda t: mp.sin(mp.sqrt(t)) / mp.sqrt(t)),
        (smooth.asinh_squared, lambda t: mp.asinh(mp.sqrt(t)) ** 2),
        (smooth.asinh_ratio, lambda t: mp.asinh(mp.sqrt(t)) / mp.sqrt(t * (1 + t))),
        (smooth.arcsin_squared, lambda t: mp.asin(mp.sqrt(t)) ** 2),
        (smooth.arcsin_ratio, lambda t: mp.asin(mp.sqrt(t)) / mp.sqrt(t * (1 - t))),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_smooth_functions_and_their_slopes_against_60_digits(function, exact):
    t = torch.tensor([1e-12, 1e-4, 9.9e-3, 0.01, 0.0101, 0.3, 0.5]).double().requires_grad_(True)
    value = function(t)
    (slope,) = torch.autograd.grad(value.sum(), t)
    for i, at in enumerate(t.tolist()):
        right, steep = exact(mpf(at)), mp.diff(exact, mpf(at), h=mpf(at) * mpf(10) ** -20)
        assert abs(float(value[i].detach()) - right) <= 4e-16 * abs(right)
        assert abs(float(slope[i]) - steep) <= 1e-13 * abs(steep)
    assert math.isfinite(float(torch.autograd.grad(function(0 * t).sum(), t, allow_unused=True)[0].sum()))


def test_frechet_mean_gradient_is_that_of_the_minimum():
    ball = PoincareBall(1.0)
    x = (0.5 * torch.randn(1, 4, 2).double().clamp(-1, 1)).requires_grad_(True)
    weight = torch.rand(1, 4).double().requires_grad_(True)
    assert gradcheck(ball.frechet_mean, (x, weight), atol=1e-6)
    hyperboloid = Lorentz(2.0)
    assert gradcheck(lambda u, w: hyperboloid.frechet_mean(on(hyperboloid, u), w), (x, weight), atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_frechet_mean(kind):
    model = kind(0.8)
    for spread in (0.01, 1.0, 5.0):
        u = torch.nn.functional.normalize(torch.randn(6, 5, 3).double(), dim=-1)
        start = model.origin(3 if kind is PoincareBall else 4, dtype=torch.float64)
        x = model.expmap(start, tangent(model, start, spread * torch.rand(6, 5, 1).double() * u / 2))
        weight = torch.rand(6, 5).double()
        mean = model.frechet_mean(x, weight)
        pull = (weight[..., None] * model.logmap(mean[:, None], x)).sum(-2)
        assert model.inner(mean, model.proju(mean, pull)).sqrt().max() <= 1e-9 * spread
        two = model.frechet_mean(x[:, :2])
        assert model.dist(two, model.midpoint(x[:, 0], x[:, 1])).max() <= 1e-9
        single = model.frechet_mean(x[:, :1])
        assert model.dist(single, x[:, 0]).max() <= 1e-9
        only = torch.zeros(6, 5).double().index_fill(1, torch.tensor([3]), 2.0)
        assert model.dist(model.frechet_mean(x, only), x[:, 3]).max() <= 1e-9


def test_frechet_mean_near_the_boundary_and_its_errors():
    ball = PoincareBall(1.0)
    x = ball.projx(torch.randn(4, 6, 3) * 100)  # float32, radius 16
    mean = ball.frechet_mean(x)
    assert mean.dtype == torch.float32 and mean.norm(dim=-1).max() < 1
    shifted = ball.dist2(ball.projx(mean + 1e-2 * torch.randn(4, 3))[:, None], x).mean(-1)
    assert (ball.dist2(mean[:, None], x).mean(-1) <= shifted).all()
    for bad in (torch.tensor([1.0, -1, 1, 1, 1, 1]), torch.zeros(6), torch.full((6,), math.nan)):
        with pytest.raises(ValueError, match="weights"):
            ball.frechet_mean(x, bad.expand(4, 6))
    with pytest.raises(RuntimeError, match="converged"):
        poincare.frechet_mean(x.double(), torch.full((4, 6), 1 / 6).double(), steps=1)
