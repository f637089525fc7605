from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aat_hf.geometry import PoincareBall, RicciTensor, fisher
from aat_hf.geometry.riemann import christoffel, geodesic, ricci, riemann, scalar_curvature, sectional_curvature


def conformal(sign: float, radius: float = 1.0) -> Callable[[Tensor], Tensor]:
    """Stereographic sphere (1) or Poincare ball (-1) of this radius: curvature sign / radius^2."""

    def metric(x: Tensor) -> Tensor:
        return (2 * radius / (1 + sign * (x * x).sum())) ** 2 * torch.eye(len(x), dtype=x.dtype)

    return metric


def torus(x: Tensor) -> Tensor:
    """Torus of revolution, radii 2 and 1, at (theta around the tube, phi)."""
    return torch.diag(torch.stack([torch.ones_like(x[0]), (2 + x[0].cos()) ** 2]))


def product(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], n: int
) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.block_diag(first(x[:n]), second(x[n:]))


def simplex_chart(x: Tensor) -> Tensor:
    """Fisher metric of the simplex in its first m coordinates: diag(1/p_i) + 1/p_n."""
    return torch.diag(1 / x) + 1 / (1 - x.sum())


def schwarzschild(x: Tensor) -> Tensor:
    """Mass 1 at (t, r, theta, phi)."""
    f = 1 - 2 / x[1]
    return torch.diag(torch.stack([-f, 1 / f, x[1] ** 2, (x[1] * x[2].sin()) ** 2]))


def crooked(x: Tensor) -> Tensor:
    """A metric without symmetries."""
    a = torch.stack([torch.stack([(i + 1) * x[(i + j) % 3].sin() * x[i] for j in range(3)]) for i in range(3)])
    return torch.eye(3, dtype=x.dtype) + a @ a.T


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-11)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_constant_curvature(sign, n, dtype, tolerance):
    radius = 1.5
    metric, curvature = conformal(sign, radius), sign / radius**2
    x, u, v = torch.randn(3, 4, n, dtype=dtype)
    x = 0.2 * x
    g = torch.func.vmap(metric)(x)
    lowered = torch.einsum("bml,blijk->bmijk", g, riemann(metric, x))
    expected = curvature * (torch.einsum("blj,bik->blijk", g, g) - torch.einsum("blk,bij->blijk", g, g))
    scale = expected.abs().max()
    assert (lowered - expected).abs().max() <= tolerance * scale
    assert (ricci(metric, x) - (n - 1) * curvature * g).abs().max() <= tolerance * scale
    whole = torch.full((4,), n * (n - 1) * curvature, dtype=dtype)
    assert torch.allclose(scalar_curvature(metric, x), whole, rtol=4 * tolerance)
    found = sectional_curvature(metric, x, u, v)
    assert torch.allclose(found, torch.full((4,), curvature, dtype=dtype), rtol=40 * tolerance)


def test_torus():
    x = torch.stack([torch.linspace(-3, 3, 7), torch.randn(7)], -1).double()
    gauss = x[:, 0].cos() / (2 + x[:, 0].cos())
    u, v = torch.randn(2, 7, 2).double()
    assert torch.allclose(sectional_curvature(torus, x, u, v), gauss, rtol=1e-9, atol=1e-12)
    assert torch.allclose(scalar_curvature(torus, x), 2 * gauss, rtol=1e-12, atol=1e-13)
    symbols = christoffel(torus, x)
    assert torch.allclose(symbols[:, 0, 1, 1], x[:, 0].sin() * (2 + x[:, 0].cos()), rtol=1e-12)
    assert torch.allclose(symbols[:, 1, 0, 1], -x[:, 0].sin() / (2 + x[:, 0].cos()), rtol=1e-12)
    # Gauss-Bonnet: the total curvature of a torus vanishes
    ring = torch.arange(64).double() * (2 * math.pi / 64)
    points = torch.stack([ring, 0 * ring], -1)
    area = torch.func.vmap(torus)(points).det().sqrt()
    assert abs(float((scalar_curvature(torus, points) * area).sum())) <= 1e-11


def test_product_of_sphere_and_hyperbolic_plane():
    metric = product(conformal(1.0), conformal(-1.0, 2.0), 2)
    x = 0.3 * torch.randn(6, 4).double()
    e = torch.eye(4).double()
    g = torch.func.vmap(metric)(x)
    for i, j, expected in ((0, 1, 1.0), (2, 3, -0.25), (0, 2, 0.0), (1, 3, 0.0)):
        found = sectional_curvature(metric, x, e[i], e[j])
        assert torch.allclose(found, torch.full((6,), expected, dtype=x.dtype), atol=1e-12)
    factor = torch.tensor([1.0, 1, -0.25, -0.25]).double()
    assert torch.allclose(ricci(metric, x), factor * g, atol=1e-12)
    assert torch.allclose(scalar_curvature(metric, x), torch.full((6,), 1.5).double(), rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-11)])
def test_statistical_manifolds(dtype, tolerance):
    for m in (2, 3, 4):
        x = torch.softmax(torch.randn(5, m + 1).double(), -1)[:, :m].to(dtype)
        g = torch.func.vmap(simplex_chart)(x)
        error = (ricci(simplex_chart, x) - (m - 1) / 4 * g).abs().amax((-2, -1))
        assert (error <= tolerance * g.abs().amax((-2, -1))).all()
    point = torch.stack([torch.randn(5), torch.rand(5) + 0.5], -1).to(dtype)
    u, v = torch.randn(2, 5, 2).to(dtype)
    found = sectional_curvature(fisher.gaussian_metric, point, u, v)
    assert torch.allclose(found, torch.full((5,), -0.5, dtype=dtype), rtol=40 * tolerance)


def test_schwarzschild_is_ricci_flat_but_not_flat():
    x = torch.tensor([[0.0, 5.0, 1.0, 0.3], [1.0, 9.0, 2.0, 0.0]]).double()
    field = RicciTensor(schwarzschild)
    assert field(x).abs().max() <= 1e-13 and field.trace(x).abs().max() <= 1e-13
    assert field.einstein(x).abs().max() <= 1e-13
    g, tensor = torch.func.vmap(schwarzschild)(x), riemann(schwarzschild, x)
    lowered = torch.einsum("bml,blijk->bmijk", g, tensor)
    inverse = torch.linalg.inv(g)
    raised = torch.einsum("blijk,bia,bjc,bkd->blacd", tensor, inverse, inverse, inverse)
    kretschmann = (lowered * raised).flatten(1).sum(-1)
    assert torch.allclose(kretschmann, 48 / x[:, 1] ** 6, rtol=1e-10)


def test_symmetries_and_bianchi_identities_of_a_crooked_metric():
    x = torch.randn(6, 3).double()
    tensor = riemann(crooked, x)
    lowered = torch.einsum("bml,blijk->bmijk", torch.func.vmap(crooked)(x), tensor)
    scale = lowered.abs().max()
    assert scale > 0.1
    for residual in (
        lowered + lowered.transpose(1, 2),
        lowered + lowered.transpose(3, 4),
        lowered - lowered.permute(0, 3, 4, 1, 2),
        lowered + lowered.permute(0, 1, 3, 4, 2) + lowered.permute(0, 1, 4, 2, 3),
    ):
        assert residual.abs().max() <= 1e-12 * scale
    symbols = christoffel(crooked, x)
    assert torch.allclose(symbols, symbols.transpose(-1, -2), atol=1e-14)
    # second identity, contracted: the Einstein tensor has no divergence
    field = RicciTensor(crooked)
    for at, gamma in zip(x[:2], symbols[:2], strict=True):
        inverse = torch.linalg.inv(crooked(at))
        slope = torch.func.jacfwd(field.einstein)(at)  # [i, k, m]
        tensor = field.einstein(at)
        covariant = slope - torch.einsum("lmi,lk->ikm", gamma, tensor) - torch.einsum("lmk,il->ikm", gamma, tensor)
        assert torch.einsum("im,ikm->k", inverse, covariant).abs().max() <= 1e-10 * tensor.abs().max()


def test_einstein_tensor_of_a_sphere_and_of_surfaces():
    metric = conformal(1.0)
    x = 0.3 * torch.randn(2, 3, 4).double()
    g = torch.func.vmap(torch.func.vmap(metric))(x)
    assert torch.allclose(RicciTensor(metric).einstein(x), 3 * g - 6 * g, rtol=1e-11)
    assert torch.allclose(RicciTensor(metric).trace(x), torch.full((2, 3), 12.0).double(), rtol=1e-11)
    assert RicciTensor(torus).einstein(x[..., :2]).abs().max() <= 1e-13


@settings(max_examples=8, deadline=None)
@given(shape=st.lists(st.integers(1, 3), max_size=2), n=st.integers(1, 4), seed=st.integers(0, 99))
def test_shapes_and_scaling(shape, n, seed):
    torch.manual_seed(seed)
    metric = conformal(-1.0)
    x = 0.2 * torch.randn(*shape, n).double()
    assert christoffel(metric, x).shape == (*shape, n, n, n)
    assert riemann(metric, x).shape == (*shape, n, n, n, n)
    assert scalar_curvature(metric, x).shape == tuple(shape)
    # Ricci does not change when the metric is scaled, the scalar curvature divides
    assert torch.allclose(ricci(lambda x: 3 * metric(x), x), ricci(metric, x), atol=1e-12)
    scaled = scalar_curvature(lambda x: 3 * metric(x), x)
    assert torch.allclose(scaled, torch.full(shape, -n * (n - 1) / 3, dtype=x.dtype), rtol=1e-11)


def test_geodesics_against_closed_forms():
    ball = PoincareBall(1.0)
    x = 0.4 * torch.randn(5, 3).double().clamp(-1, 1)
    v = 0.3 * torch.randn(5, 3).double()
    points, velocities = geodesic(conformal(-1.0), x, v, steps=80)
    assert points.shape == velocities.shape == (81, 5, 3)
    assert torch.allclose(points[-1], ball.expmap(x, v), atol=1e-8)
    assert torch.allclose(points[20], ball.expmap(x, v / 4), atol=1e-9)
    assert torch.allclose(velocities[-1], ball.transp(x, points[-1], v), atol=1e-8)
    p, r = torch.softmax(torch.randn(2, 4, 4).double(), -1)
    w = fisher.logmap(p, r)
    path, _ = geodesic(simplex_chart, p[:, :3], w[:, :3], steps=80)
    assert torch.allclose(path[-1], r[:, :3], atol=1e-7)
    assert torch.allclose(path[24], fisher.geodesic(p, r, 0.3)[:, :3], atol=1e-7)


def test_gaussian_distance_is_the_length_of_the_geodesic():
    start, v = torch.tensor([[0.3, 0.8]]).double(), torch.tensor([[0.5, -0.2]]).double()
    points, _ = geodesic(fisher.gaussian_metric, start, v, steps=40)
    end = points[-1]
    length = torch.einsum("bi,bij,bj->b", v, fisher.gaussian_metric(start), v).sqrt()
    found = fisher.gaussian_distance(start[:, :1], start[:, 1:], end[:, :1], end[:, 1:])
    assert torch.allclose(found, length, rtol=1e-7)


def test_geodesics_keep_their_speed_and_converge_with_order_four():
    x, v = torch.tensor([0.5, 0.0]).double(), torch.tensor([0.8, 0.5]).double()
    end = {steps: geodesic(torus, x, v, steps=steps, time=3.0) for steps in (10, 20, 80)}
    errors = [float((end[steps][0][-1] - end[80][0][-1]).norm()) for steps in (10, 20)]
    assert 10 < errors[0] / errors[1] < 22
    points, velocities = end[80]
    speed = torch.einsum("ti,tij,tj->t", velocities, torch.func.vmap(torus)(points), velocities)
    assert torch.allclose(speed, speed[0].expand_as(speed), rtol=1e-6)
    clairaut = (2 + points[:, 0].cos()) ** 2 * velocities[:, 1]  # angular momentum
    assert torch.allclose(clairaut, clairaut[0].expand_as(clairaut), rtol=1e-6)
    back, _ = geodesic(torus, points[-1], -velocities[-1], steps=80, time=3.0)
    assert torch.allclose(back[-1], x, atol=1e-6)
    with pytest.raises(ValueError, match="steps"):
        geodesic(torus, x, v, steps=0)


def test_curvature_and_geodesics_are_differentiable():
    x = (0.2 * torch.randn(2, 2).double()).requires_grad_(True)
    v = (0.2 * torch.randn(2, 2).double()).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: scalar_curvature(torus, x), (x,))
    assert torch.autograd.gradcheck(lambda x, v: geodesic(torus, x, v, steps=2)[0], (x, v))
