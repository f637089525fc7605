from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp
from oracles import fisher_rao, relative, rows
from torch.autograd import gradcheck, gradgradcheck

from aat_hf.bench._geometry_libraries import tolerant_imports
from aat_hf.geometry import fisher


def simplex(*shape: int, sharp: float = 1.0) -> torch.Tensor:
    return torch.softmax(sharp * torch.randn(*shape, dtype=torch.float64), -1)


@pytest.mark.parametrize("size", [1e-1, 1e-3, 1e-5])
def test_distance_of_near_rows_against_60_digits_in_float32(size):
    for n in (2, 16, 300):
        p = simplex(10, n)
        r = p * (1 + size * torch.randn(10, n))
        p, r = p.float(), (r / r.sum(-1, keepdim=True)).float()
        error = relative(fisher.distance(p, r), rows(fisher_rao, p, r))
        assert error <= 1e-6
        assert relative(fisher.distance2(p, r).double().sqrt(), rows(fisher_rao, p, r)) <= 1e-6


def test_distance_over_the_whole_range_against_60_digits():
    p, r = simplex(30, 8, sharp=6), simplex(30, 8, sharp=6)
    p[:5, :4] = 0
    r[:5, 4:] = 0  # disjoint support: the diameter
    p, r = p / p.sum(-1, keepdim=True), r / r.sum(-1, keepdim=True)
    assert relative(fisher.distance(p, r), rows(fisher_rao, p, r)) <= 1e-14
    assert relative(fisher.distance2(p, r).sqrt(), rows(fisher_rao, p, r)) <= 1e-14
    assert torch.allclose(fisher.distance(p, r)[:5], torch.full((5,), math.pi, dtype=torch.float64), rtol=1e-15)
    assert relative(fisher.distance(p.float(), r.float()), rows(fisher_rao, p.float(), r.float())) <= 1e-6


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=2),
    n=st.integers(1, 9),
    sharp=st.floats(0, 300),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_axioms_and_finiteness(shape, n, sharp, dtype, seed):
    torch.manual_seed(seed)
    p, q, r = (simplex(*shape, n, sharp=sharp).to(dtype).requires_grad_(True) for _ in range(3))
    d = fisher.distance(p, r)
    assert d.shape == tuple(shape) and d.dtype == dtype
    assert ((d >= 0) & (d <= math.pi * (1 + 1e-7))).all()
    assert torch.equal(d, fisher.distance(r, p))
    assert torch.equal(fisher.distance(p, p.clone()), torch.zeros_like(d))
    assert (d <= fisher.distance(p, q) + fisher.distance(q, r) + 1e-6).all()
    total = fisher.distance(p, r).sum() + fisher.distance(p, p.clone()).sum() + fisher.distance2(p, r).sum()
    total = total + fisher.logmap(p, r).sum() + fisher.geodesic(p, r, 0.3).sum() + fisher.midpoint(p, r).sum()
    assert total.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(total, (p, r)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_dropping_keys_is_at_distance_2_arccos_root_mass_and_coarse_rows_are_closer(dtype, tolerance):
    p, r = simplex(20, 12, sharp=2).to(dtype), simplex(20, 12, sharp=2).to(dtype)
    kept = torch.rand(20, 12) < 0.6
    kept[:, 0] = True
    lost = (p.double() * ~kept).sum(-1) / p.double().sum(-1)
    expected = (2 * lost.sqrt().arcsin()).to(dtype)  # 2 arccos sqrt(1 - lost), well conditioned
    assert torch.allclose(fisher.distance(p, p * kept), expected, rtol=tolerance)
    tiles = p.unflatten(-1, (4, 3)).sum(-1), r.unflatten(-1, (4, 3)).sum(-1)
    assert (fisher.distance(*tiles) <= fisher.distance(p, r) + min(tolerance, 1e-6)).all()


def test_logits_give_the_same_distance_with_finite_gradients():
    s, t = 3 * torch.randn(2, 10, 6).double()
    s[:, 0], t[:, 1] = -math.inf, -math.inf
    s.requires_grad_(True)
    d = fisher.distance_logits(s, t)
    assert torch.allclose(d, fisher.distance(s.softmax(-1), t.softmax(-1)), rtol=1e-13)
    (gradient,) = torch.autograd.grad(d.sum(), s)
    assert gradient.isfinite().all() and gradient[:, 1:].abs().min() > 0
    assert torch.equal(fisher.distance_logits(s, s), torch.zeros(10, dtype=torch.float64))
    free = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda s: fisher.distance_logits(s, t[:3, 2:]), (free,))


@pytest.mark.parametrize(
    "function",
    [
        fisher.distance,
        fisher.distance2,
        fisher.logmap,
        fisher.midpoint,
        lambda p, r: fisher.geodesic(p, r, 0.3),
        lambda p, r: fisher.expmap(p, 0.1 * (r - p)),
        fisher.distance_logits,
    ],
)
def test_rows_that_see_no_key_are_nan_and_can_be_masked_out_of_a_loss(function):
    p, r = simplex(3, 4), simplex(3, 4)
    p[1] = 0
    if function is fisher.distance_logits:
        p, r = p.log(), r.log()
    value = function(p.requires_grad_(True), r.requires_grad_(True))
    assert value[1].isnan().all() and value[::2].isfinite().all()
    dead = torch.tensor([False, True, False]).view(3, *[1] * (value.ndim - 1))
    gradients = torch.autograd.grad(torch.where(dead, 0.0, value).square().sum(), (p, r))
    alone = [x.detach()[::2].requires_grad_(True) for x in (p, r)]
    expected = torch.autograd.grad(function(*alone).square().sum(), alone)
    for found, without in zip(gradients, expected, strict=True):
        assert not found[1].any() and torch.equal(found[::2], without)


def test_distances_agree_with_geomstats():
    with tolerant_imports():
        categorical = pytest.importorskip("geomstats.information_geometry.categorical")
        normal = pytest.importorskip("geomstats.information_geometry.normal")
    p, r = simplex(10, 5, sharp=2), simplex(10, 5, sharp=2)
    theirs = categorical.CategoricalDistributions(dim=4).metric.dist(p.numpy(), r.numpy())
    assert torch.allclose(fisher.distance(p, r), torch.as_tensor(theirs), rtol=1e-9)
    a, b = (torch.stack([torch.randn(10), torch.rand(10) + 0.5], -1).double() for _ in range(2))
    theirs = normal.UnivariateNormalDistributions().metric.dist(a.numpy(), b.numpy())
    ours = fisher.gaussian_distance(a[:, :1], a[:, 1:], b[:, :1], b[:, 1:])
    assert torch.allclose(ours, torch.as_tensor(theirs), rtol=1e-7)


def test_gradients():
    p, r = (simplex(3, 4).requires_grad_(True) for _ in range(2))
    v = (torch.randn(3, 4).double() * 0.1).requires_grad_(True)
    twin = p.detach().clone().requires_grad_(True)
    assert gradcheck(fisher.distance, (p, r))
    assert gradcheck(fisher.distance2, (p, r)) and gradgradcheck(fisher.distance2, (p, r))
    assert gradcheck(fisher.distance2, (p, twin)) and gradgradcheck(fisher.distance2, (p, twin))
    assert gradcheck(fisher.logmap, (p, r)) and gradcheck(fisher.logmap, (p, twin))
    assert gradcheck(fisher.expmap, (p, v)) and gradcheck(fisher.expmap, (p, torch.zeros_like(v, requires_grad=True)))
    assert gradcheck(lambda p, r: fisher.geodesic(p, r, 0.3), (p, r))
    assert gradcheck(fisher.midpoint, (p, r)) and gradcheck(fisher.inner, (p, v))
    for gradient in torch.autograd.grad(fisher.distance(p, twin).sum(), (p, twin)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_hessian_of_the_squared_distance_is_twice_the_metric():
    p = simplex(5)
    basis = torch.cat([torch.eye(4), -torch.ones(1, 4)]).double()  # tangent vectors of sum 0
    hessian = torch.func.hessian(lambda w: fisher.distance2(p, p + basis @ w))(torch.zeros(4).double())
    assert torch.allclose(hessian, 2 * (basis.T / p) @ basis, rtol=1e-11)


def test_geodesic_has_constant_speed_and_its_midpoint():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        p, r = simplex(10, 6, sharp=2).to(dtype), simplex(10, 6, sharp=2).to(dtype)
        whole = fisher.distance(p, r)
        for t in (0.0, 0.1, 0.5, 0.9, 1.0):
            at = fisher.geodesic(p, r, t)
            assert torch.allclose(at.sum(-1), torch.ones(10, dtype=dtype), atol=tolerance)
            assert torch.allclose(fisher.distance(p, at), t * whole, atol=tolerance)
            assert torch.allclose(fisher.distance(at, r), (1 - t) * whole, atol=tolerance)
        assert torch.allclose(fisher.midpoint(p, r), fisher.geodesic(p, r, 0.5), atol=tolerance)
        assert torch.allclose(fisher.geodesic(p, p, 0.3), p, atol=tolerance)
        times = torch.rand(10, dtype=dtype)
        assert torch.allclose(fisher.distance(p, fisher.geodesic(p, r, times)), times * whole, atol=tolerance)


def test_exp_and_log_are_inverse():
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
        p, r = simplex(10, 6).to(dtype), simplex(10, 6).to(dtype)
        v = fisher.logmap(p, r)
        assert torch.allclose(v.sum(-1), torch.zeros(10, dtype=dtype), atol=tolerance)
        assert torch.allclose(fisher.inner(p, v).sqrt(), fisher.distance(p, r), rtol=tolerance)
        assert torch.allclose(fisher.expmap(p, v), r, atol=tolerance)
        small = v * 0.3
        assert torch.allclose(fisher.logmap(p, fisher.expmap(p, small)), small, atol=tolerance)
        assert torch.equal(fisher.logmap(p, p), torch.zeros_like(p))
        assert torch.allclose(fisher.expmap(p, 0 * v), p, atol=tolerance)
    edge = torch.tensor([0.5, 0.5, 0.0])
    assert torch.allclose(fisher.expmap(edge, torch.tensor([0.1, -0.1, 0.0])).sum(), torch.ones(()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_softmax_metric_four_ways(dtype, tolerance):
    """Hessian of the log-partition, covariance of the keys, pull-back of the simplex's metric, Gram of 2 d sqrt p."""
    k, q = torch.randn(9, 3).to(dtype), torch.randn(3).to(dtype)
    p = torch.softmax(k @ q, -1)
    hessian = fisher.exponential_family_metric(lambda q: torch.logsumexp(k @ q, -1), q)
    _, covariance = fisher.tile_metric(k, p)
    jacobian = torch.func.jacrev(lambda q: torch.softmax(k @ q, -1))(q)
    roots = torch.func.jacrev(lambda q: 2 * torch.softmax(k @ q, -1).sqrt())(q)
    for metric in (covariance, k.T @ fisher.softmax_metric(p) @ k, (jacobian.T / p) @ jacobian, roots.T @ roots):
        assert torch.allclose(metric, hessian, rtol=tolerance, atol=tolerance / 10)
    batch = torch.randn(2, 4, 3).to(dtype)
    several = fisher.exponential_family_metric(lambda q: torch.logsumexp(k @ q, -1), batch)
    assert several.shape == (2, 4, 3, 3)
    alone = fisher.exponential_family_metric(lambda q: (k @ q).logsumexp(-1), batch[1, 2])
    assert torch.allclose(several[1, 2], alone, rtol=tolerance, atol=tolerance / 10)


def test_tile_metric_is_the_population_covariance_of_the_existing_keys():
    k = torch.randn(2, 3, 11, 4)
    exists = torch.rand(2, 3, 11) < 0.7
    exists[..., :2] = True
    exists[0, 1] = False
    broken = torch.where(exists[..., None], k, torch.nan)
    mean, covariance = fisher.tile_metric(broken, exists)
    for index in np.ndindex(2, 3):
        rows_of = k[index][exists[index]].double().numpy()
        if len(rows_of) == 0:
            assert not mean[index].any() and not covariance[index].any()
            continue
        assert torch.allclose(mean[index].double(), torch.from_numpy(rows_of.mean(0)), atol=1e-6)
        assert torch.allclose(covariance[index].double(), torch.from_numpy(np.cov(rows_of.T, ddof=0)), atol=1e-6)
    _, alone = fisher.tile_metric(k)
    _, moved = fisher.tile_metric(k + 100.0)
    assert torch.allclose(alone, moved, atol=1e-4)
    assert fisher.tile_metric(k.bfloat16())[1].dtype == torch.float32
    metric = fisher.tile_metric(k.double().requires_grad_(True))[1]
    assert torch.linalg.eigvalsh(metric).min() > -1e-12


def test_natural_gradient():
    s = torch.randn(5, 6).double()
    p = s.softmax(-1)
    target = simplex(5, 6)
    step = fisher.natural_gradient(fisher.softmax_metric(p), p - target)  # the gradient of the cross entropy
    assert torch.allclose(step.sum(-1), torch.zeros(5).double(), atol=1e-10)
    expected = 1 - target / p
    assert torch.allclose(step, expected - expected.mean(-1, keepdim=True), atol=1e-9)
    # invariance: in other coordinates theta = A phi the step is that of theta
    change = torch.randn(6, 6).double()
    metric = fisher.softmax_metric(p) + 0.1 * torch.eye(6).double()
    there = fisher.natural_gradient(change.T @ metric @ change, (p - target) @ change)
    assert torch.allclose(there @ change.T, fisher.natural_gradient(metric, p - target), rtol=1e-7, atol=1e-9)
    damped = fisher.natural_gradient(fisher.softmax_metric(p), p - target, damping=0.3)
    assert torch.allclose(fisher.softmax_metric(p) @ damped[..., None] + 0.3 * damped[..., None],
                          (p - target)[..., None], atol=1e-12)  # fmt: skip
    with pytest.raises(ValueError, match="damping"):
        fisher.natural_gradient(metric, p, damping=-1.0)


def test_gaussian_distance_against_60_digits_and_known_values():
    def exact(a, b):
        x = ((a[0] - b[0]) ** 2 / 2 + (a[1] - b[1]) ** 2) / (2 * a[1] * b[1])
        return mp.sqrt(2) * mp.acosh(1 + x)

    a = torch.cat([torch.randn(40, 1), torch.rand(40, 1) * 3 + 0.01], -1)
    b = torch.cat([a[:20] * (1 + 1e-3 * torch.randn(20, 2)), a[20:].roll(1, 0)])
    found = fisher.gaussian_distance(a[:, :1], a[:, 1:], b[:, :1], b[:, 1:])
    assert found.dtype == torch.float32 and relative(found, rows(exact, a, b)) <= 1e-6
    one = torch.ones(1).double()
    assert math.isclose(float(fisher.gaussian_distance(0 * one, one, 0 * one, math.e * one)), math.sqrt(2))
    zero = fisher.gaussian_distance(a[:, :1], a[:, 1:], a[:, :1], a[:, 1:])
    assert torch.equal(zero, torch.zeros(40))
    each = fisher.gaussian_distance(*(t[:, None] for t in (a[:, 0], a[:, 1], b[:, 0], b[:, 1])))
    together = fisher.gaussian_distance(a[:, 0], a[:, 1], b[:, 0], b[:, 1])
    assert torch.allclose(together, each.square().sum().sqrt())
    m = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    s = (torch.rand(3, 2, dtype=torch.float64) + 0.5).requires_grad_(True)
    assert gradcheck(lambda m, s: fisher.gaussian_distance(m, s, 0 * m + 0.2, 0 * s + 1.0), (m, s))


def test_gaussian_metric_is_the_expected_squared_score():
    mean, sigma = 0.3, 1.7
    x, weight = np.polynomial.hermite_e.hermegauss(20)
    score = torch.func.vmap(
        torch.func.grad(
            lambda point, x: torch.distributions.Normal(point[0], point[1], validate_args=False).log_prob(x)
        ),
        in_dims=(None, 0),
    )(torch.tensor([mean, sigma]).double(), mean + sigma * torch.from_numpy(x))
    measured = torch.einsum("n,ni,nj->ij", torch.from_numpy(weight / weight.sum()), score, score)
    assert torch.allclose(fisher.gaussian_metric(torch.tensor([mean, sigma]).double()), measured, atol=1e-6)
    # and the squared distance agrees with it to second order
    point = torch.tensor([mean, sigma]).double()
    hessian = torch.func.hessian(
        lambda b: fisher.gaussian_distance(point[:1], point[1:], b[:1] + 1e-3, b[1:]).square()
    )(point)
    assert torch.allclose(hessian, 2 * fisher.gaussian_metric(point), rtol=1e-2, atol=1e-3)
