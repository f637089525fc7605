from __future__ import annotations

import math

import pytest
import torch
from hyperbolic_points import MODELS, directions, point
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ball_distance, lorentz_distance, relative, rows
from torch import Tensor

from aat_hf.geometry import Lorentz, PoincareBall, lorentz

RADII = [1e-4, 1e-2, 0.5, 1.0, 2.0, 5.0, 8.0, 10.0, 12.0, 15.0]


def exact_distance(model, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(model, PoincareBall):
        return rows(ball_distance(model.c), x, y)
    return rows(lorentz_distance(model.c), x[..., 1:], y[..., 1:])


def near(model, direction: Tensor, radius: float, dtype) -> tuple[Tensor, Tensor]:
    """Pairs about 1e-3 apart in a random direction: y moves by 1e-3 from x, and what the dtype holds of both."""
    x = point(model, direction, radius)
    v = torch.randn_like(x)
    if isinstance(model, Lorentz):
        u = x[..., 1:]
        v = torch.cat([v[..., :1], lorentz.from_frame(u * math.sqrt(model.c), v[..., 1:])], -1)
        v = v / torch.randn(u.shape).double().norm(dim=-1, keepdim=True)
    v = v * (1e-3 / model.inner(x, v, keepdim=True).sqrt())
    y = model.expmap(x, v)
    return x.to(dtype), y.to(dtype)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("kind", MODELS)
def test_distance_against_60_digits_at_all_radii_in_float32(kind, c):
    model = kind(c)
    root = math.sqrt(c)
    for n in (2, 7):
        radius = torch.tensor(RADII).repeat_interleave(len(RADII)) / root
        other = torch.tensor(RADII).repeat(len(RADII)) / root
        x = point(model, directions(len(radius), n), radius, torch.float32)
        y = point(model, directions(len(radius), n), other, torch.float32)
        found = model.dist(x, y)
        assert found.dtype == torch.float32
        assert relative(found, exact_distance(model, x, y)) <= 1e-6
        assert relative(model.dist2(x, y).double().sqrt(), exact_distance(model, x, y)) <= 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_distance_against_60_digits_along_one_ray_in_float32(kind):
    model = kind(1.0)
    radius, other = torch.cartesian_prod(torch.tensor(RADII), torch.tensor(RADII)).T
    apart = radius != other
    direction = directions(int(apart.sum()), 3)
    x = point(model, direction, radius[apart], torch.float32)
    y = point(model, direction, other[apart], torch.float32)
    assert relative(model.dist(x, y), exact_distance(model, x, y)) <= 1e-6
    assert relative(model.dist(x, -y if kind is PoincareBall else y * torch.tensor([1.0, -1, -1, -1])),
                    exact_distance(model, x, -y)) <= 1e-6  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("radius", RADII)
def test_near_pairs_against_60_digits_in_float32(kind, radius):
    model = kind(1.0)
    x, y = near(model, directions(30, 4), radius, torch.float32)
    exact = exact_distance(model, x, y)
    kept = exact > 0  # far out in the ball, float32 may not tell them apart
    assert kept.any()
    assert relative(model.dist(x[kept], y[kept]), exact[kept]) <= 1e-6
    if radius <= (5 if kind is PoincareBall else 8):  # further out, float32 coordinates are themselves coarser
        assert 0.5e-3 < float(exact.median()) < 2e-3  # the test does look at near pairs


@pytest.mark.parametrize("kind", MODELS)
def test_neighbouring_float32_numbers_at_all_radii(kind):
    model = kind(1.0)
    x = point(model, directions(len(RADII), 3), torch.tensor(RADII), torch.float32)
    y = x.clone()
    y[:, -1] = torch.nextafter(x[:, -1], torch.zeros(()))
    assert relative(model.dist(x, y), exact_distance(model, x, y)) <= 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_distance_in_float64_is_at_the_conditioning_limit(kind):
    model = kind(1.0)
    for radius in RADII:
        x, y = near(model, directions(20, 3), radius, torch.float64)
        bound = 8 * 2.2e-16 * math.exp(radius)
        assert relative(model.dist(x, y), exact_distance(model, x, y)) <= max(bound, 1e-14)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(MODELS),
    c=st.floats(1e-3, 1e3),
    shape=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(1, 5),
    radius=st.floats(0, 15),
    gap=st.floats(0, 30),
    seed=st.integers(0, 1000),
)
def test_axioms(kind, c, shape, n, radius, gap, seed):
    torch.manual_seed(seed)
    model = kind(c)
    x, y, z = (point(model, torch.nn.functional.normalize(torch.randn(*shape, n).double(), dim=-1), r / c**0.5)
               for r in (radius, abs(radius - gap), radius / 2))  # fmt: skip
    x, y, z = (model.projx(t.float()) for t in (x, y, z))
    d = model.dist(x, y)
    assert d.shape == tuple(shape)
    assert d.isfinite().all() and (d >= 0).all()
    assert torch.equal(d, model.dist(y, x))
    assert torch.equal(model.dist(x, x), torch.zeros(shape))
    assert torch.equal(model.dist2(x, x), torch.zeros(shape))
    assert (d <= (model.dist(x, z) + model.dist(z, y)) * (1 + 1e-6)).all()
    assert torch.allclose(model.dist2(x, y), d.square(), rtol=1e-6, atol=0)
    assert model.dist(x, y, keepdim=True).shape == (*shape, 1)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("c", [0.2, 1.0, 3.0])
def test_exp_and_log_are_inverse(kind, c):
    model, root = kind(c), math.sqrt(c)
    for radius in (0.0, 1e-5, 0.3, 2.0, 5.0):
        for length in (1e-6, 1e-2, 1.0, 5.0):
            x = point(model, directions(10, 4), radius / root)
            v = model.proju(x, torch.randn_like(x))
            v = v * (length / root / model.inner(x, v, keepdim=True).sqrt())
            y = model.expmap(x, v)
            back = model.logmap(x, y)
            error = model.inner(x, back - v).sqrt() * root
            assert error.max() <= 64 * 2.2e-16 * math.exp(radius + length)
            assert torch.allclose(model.dist(x, y), torch.full((10,), length / root, dtype=x.dtype), rtol=1e-9)
            assert model.dist(model.expmap(x, back), y).max() * root <= 64 * 2.2e-16 * math.exp(radius + length)


@pytest.mark.parametrize("kind", MODELS)
def test_exp_and_log_are_inverse_in_float32(kind):
    model = kind(1.0)
    eps = torch.finfo(torch.float32).eps
    for radius in (0.0, 0.3, 2.0, 4.0):
        for length in (1e-3, 1.0, 4.0):
            x = point(model, directions(50, 4), radius, torch.float32)
            v = model.proju(x, torch.randn_like(x))
            v = v * (length / model.inner(x, v, keepdim=True).sqrt())
            back = model.logmap(x, model.expmap(x, v))
            error = model.inner(x.double(), (back - v).double()).sqrt()
            assert error.max() <= 4 * eps * math.exp(radius + length)


@pytest.mark.parametrize("kind", MODELS)
def test_midpoint_halves_the_geodesic(kind):
    model = kind(0.7)
    x, y = (point(model, directions(20, 3), 5 * torch.rand(20)) for _ in range(2))
    middle = model.midpoint(x, y)
    half = model.dist(x, y) / 2
    assert torch.allclose(model.dist(x, middle), half, rtol=1e-9)
    assert torch.allclose(model.dist(y, middle), half, rtol=1e-9)
    assert torch.allclose(model.midpoint(x, x), x, rtol=1e-14)
    assert torch.allclose(middle, model.expmap(x, model.logmap(x, y) / 2), atol=1e-10)


def test_flat_limit():
    x, y = torch.randn(2, 20, 4).double()
    flat = (x - y).norm(dim=-1)
    for c in (1e-4, 1e-7):
        assert relative(2 * flat, PoincareBall(c).dist(x, y)) <= 20 * c  # the ball's metric is 4 |dx|^2 at 0
        lift = Lorentz(c).projx(torch.cat([x[:, :1], x], -1)), Lorentz(c).projx(torch.cat([y[:, :1], y], -1))
        assert relative(Lorentz(c).dist2(*lift), flat.square()) <= 20 * c


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(MODELS),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    c=st.floats(1e-2, 1e2),
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=9, max_size=9),
)
def test_nothing_finite_gives_nan_or_inf(kind, dtype, c, values):
    model = kind(c)
    raw = torch.tensor(values, dtype=dtype).view(3, 3)
    if kind is Lorentz:
        raw = torch.cat([raw[:, :1], raw], -1)
    x, y, v = model.projx(raw[0]), model.projx(raw[1]), model.proju(model.projx(raw[0]), raw[2])
    x.requires_grad_(True)
    d, d2 = model.dist(x, y), model.dist2(x, y)
    assert d.isfinite() and d2.isfinite()
    (slope,) = torch.autograd.grad(d + d2, x)
    assert slope.isfinite().all()
    if kind is PoincareBall:  # every velocity reaches a point of the ball; the hyperboloid overflows at radius 88
        assert (math.sqrt(c) * model.expmap(x, v).double().norm()) < 1
        assert model.dist(model.expmap(x, v), y).isfinite()
        assert model.logmap(x, y).isfinite().all() and model.midpoint(x, y).isfinite().all()
        assert model.transp(x, y, torch.ones(3, dtype=dtype)).isfinite().all()


def test_the_last_points_of_the_ball_and_those_outside():
    for dtype in (torch.float32, torch.float64):
        ball = PoincareBall(1.0)
        edge = torch.nextafter(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype))
        assert ball.dist(edge, torch.zeros(1, dtype=dtype)).isfinite()
        assert relative(ball.dist(edge, -edge), rows(ball_distance(), edge[None], -edge[None])) <= 1e-6
        many = ball.projx(torch.randn(2000, 64, dtype=dtype))
        assert ball.dist(many[:1000], many[1000:]).isfinite().all()
        assert torch.equal(ball.projx(many), many)
        for c in (0.3, 7.0):
            few = PoincareBall(c).projx(torch.randn(5000, 2, dtype=dtype) * 10)
            assert torch.equal(PoincareBall(c).projx(few), few)
            assert ((few.double().square().sum(-1) * c) < 1).all()
        assert ball.dist(1.01 * edge, 0 * edge).isnan()


def test_curvature_is_checked_and_can_be_learnt():
    for c in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="c must be positive"):
            PoincareBall(c)
    c = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    x, y = 0.3 * torch.randn(2, 4, 3).double()
    for model in MODELS:
        assert torch.autograd.gradcheck(lambda c, model=model: model(c).dist(x, y), (c,))


@pytest.mark.parametrize("kind", MODELS)
def test_large_batches_are_computed_in_blocks_with_the_same_result(kind):
    model = kind(1.0)
    x, y = (point(model, directions(50_000, 8), 2.0, torch.float32) for _ in range(2))
    assert torch.equal(model.dist(x, y)[-100:], model.dist(x[-100:], y[-100:]))
    assert torch.equal(model.logmap(x.view(100, 500, -1), y.view(100, 500, -1))[-1], model.logmap(x[-500:], y[-500:]))


@pytest.mark.parametrize("kind", MODELS)
def test_agrees_with_geoopt_where_geoopt_is_right(kind):
    geoopt = pytest.importorskip("geoopt")
    model = kind(1.0)
    other = geoopt.PoincareBall(c=1.0) if kind is PoincareBall else geoopt.Lorentz(k=1.0)
    x, y = (point(model, directions(20, 3), 1 + torch.rand(20)) for _ in range(2))
    v = model.proju(x, 0.3 * torch.randn_like(x))
    for name, arguments in {
        "dist": (x, y),
        "logmap": (x, y),
        "expmap": (x, v),
        "transp": (x, y, v),
        "projx": (x,),
        "proju": (x, v),
    }.items():
        assert torch.allclose(getattr(model, name)(*arguments), getattr(other, name)(*arguments), rtol=1e-6), name
    theirs = other.inner(x, v, keepdim=True)[..., 0] if kind is PoincareBall else other.inner(v, v)
    assert torch.allclose(model.inner(x, v), theirs)
    assert torch.equal(model.origin(2, 3), other.origin(2, 3))
