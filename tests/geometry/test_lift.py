"""Lifted scores against distances and angles computed directly, and attention with them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import peaked

from aat_hf import AATConfig, tiled_attention
from aat_hf.geometry import Lorentz
from aat_hf.geometry.lift import default_curvature, lift


def points(*shape, gain=1.0, dtype=torch.float64):
    return gain * torch.randn(*shape, dtype=dtype)


def scores(q, k, geometry, curvature=None):
    q, k = lift(q, k, geometry, curvature)
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def distances(q, k, c):
    """Pairwise hyperbolic distances of points given by their spatial parts: (..., queries, keys)."""
    q, k = (torch.nn.functional.pad(x, (1, 0)) for x in (q, k))  # the time coordinate is not read
    return Lorentz(c).dist(q[:, :, :, None], k[:, :, None])


@pytest.mark.parametrize("c", [1e-6, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hyperbolic_scores_are_distances_up_to_a_constant_of_the_row(c, dtype):
    q, k = points(2, 3, 5, 7, dtype=dtype), points(2, 3, 11, 7, dtype=dtype)
    distance = distances(q.double(), k.double(), c)
    expected = -2 * torch.sinh(math.sqrt(c) * distance / 2).square() / c  # (1 - cosh) / c
    found = scores(q, k, "hyperbolic", c).double()
    row = found[..., :1] - expected[..., :1]
    assert torch.allclose(found - row, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_flat_limit_is_euclidean_distance():
    q, k = points(1, 1, 5, 7), points(1, 1, 11, 7)
    expected = (q.square().sum(-1, keepdim=True) - torch.cdist(q, k).square()) / 2
    assert torch.allclose(scores(q, k, "hyperbolic", 1e-9), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "c", "tolerance"), [(torch.float32, 1e-4, 1e-3), (torch.float64, 1e-7, 1e-6)])
def test_flat_limit_of_hyperbolic_attention_is_dot_product_attention(small, dtype, c, tolerance):
    """For keys of one length |k|^2 / 2 shifts whole rows, which softmax does not see."""
    q, k, v = points(1, 4, 20, 8, dtype=dtype), points(1, 2, 20, 8, dtype=dtype), points(1, 2, 20, 8, dtype=dtype)
    k = 2 * torch.nn.functional.normalize(k, dim=-1)
    config = small.replace(geometry="hyperbolic", curvature=c, mode="dense")
    found = tiled_attention(q, k, v, config=config, is_causal=True).output
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(("curvature", "radius"), [(None, math.sqrt(7)), (1.0, 1.0), (0.25, 2.0)])
def test_spherical_scores_are_cosines(curvature, radius):
    q, k = points(2, 3, 5, 7), points(2, 3, 11, 7)
    expected = radius**2 * torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    assert torch.allclose(scores(q, k, "spherical", curvature), expected, atol=1e-12)


@pytest.mark.parametrize("geometry", ["hyperbolic", "spherical"])
def test_each_head_has_its_curvature(geometry):
    q, k, c = points(2, 6, 5, 7), points(2, 3, 11, 7), torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    found = scores(q, k, geometry, c)
    for head in range(6):
        kv = head // 2
        alone = scores(q[:, head : head + 1], k[:, kv : kv + 1], geometry, float(c[kv]))
        assert torch.allclose(found[:, head : head + 1], alone)


@pytest.mark.parametrize("geometry", ["hyperbolic", "spherical"])
def test_gradients(geometry):
    q, k = points(1, 4, 3, 5).requires_grad_(), points(1, 2, 4, 5).requires_grad_()
    c = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: scores(*x[:2], geometry, x[2]), (q, k, c))


def test_hyperbolic_gradient_at_the_origin_is_that_of_the_dot_product():
    q, k = torch.zeros(1, 1, 2, 5).requires_grad_(), points(1, 1, 3, 5, dtype=torch.float32).requires_grad_()
    scores(q, k, "hyperbolic").sum().backward()
    assert torch.allclose(q.grad, k.detach().sum(2, keepdim=True).expand_as(q), atol=1e-6)


def test_a_zero_vector_on_the_sphere_scores_zero_with_a_finite_gradient():
    q, k = torch.zeros(1, 1, 2, 5).requires_grad_(), torch.randn(1, 1, 3, 5)
    found = scores(q, k, "spherical")
    found.sum().backward()
    assert torch.equal(found, torch.zeros_like(found)) and q.grad.isfinite().all()


def largest_gradient(x, geometry, c):
    """A bound of the gradient of the sum of the lifted components: entries of the Jacobian by their number."""
    c = default_curvature(geometry, x.shape[-1]) if c is None else c
    if geometry == "hyperbolic":
        return x.shape[-1] + max(math.sqrt(c), float(x.detach().abs().max()))
    smallest = max(float(x.detach().float().norm(dim=-1).min()), torch.finfo(x.dtype).eps)
    return x.shape[-1] / math.sqrt(c) / smallest


@settings(max_examples=40, deadline=None)
@given(
    geometry=st.sampled_from(["hyperbolic", "spherical"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    gain=st.sampled_from([0.0, 1e-4, 1.0, 30.0]),
    c=st.sampled_from([None, 1e-6, 1.0, 1e4]),
    dim=st.integers(1, 9),
)
def test_lifts_are_finite(geometry, dtype, gain, c, dim):
    torch.manual_seed(dim)
    q, k = (points(1, 2, 5, dim, gain=gain).to(dtype).requires_grad_() for _ in range(2))
    found = lift(q, k, geometry, c)
    torch.autograd.backward([x.float().sum() for x in found])
    assert all(x.dtype == dtype and x.float().isfinite().all() for x in found)
    assert all(x.grad.isfinite().all() for x in (q, k) if largest_gradient(x, geometry, c) < torch.finfo(dtype).max)


def test_unknown_geometry_and_wrong_curvature_are_refused():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="must be one of 'euclidean', 'hyperbolic', 'spherical'"):
        lift(q, q, "toroidal")
    with pytest.raises(ValueError, match=r"curvature has shape \(3,\): must be \(2,\)"):
        lift(q, q, "hyperbolic", torch.ones(3))
    with pytest.raises(ValueError, match=r"AATConfig.geometry = 'flat'"):
        AATConfig(geometry="flat")
    with pytest.raises(ValueError, match=r"AATConfig.curvature = 0"):
        AATConfig(geometry="hyperbolic", curvature=0)


def direct(q, k, v, geometry, curvature):
    """Causal attention by distance or angle, no lift."""
    k, v = k.repeat_interleave(q.shape[1] // k.shape[1], 1), v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    if geometry == "hyperbolic":
        score = -torch.cosh(math.sqrt(curvature) * distances(q, k, curvature)) / curvature
    else:
        score = torch.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1) / curvature
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return torch.softmax((score * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf), -1) @ v


@pytest.mark.parametrize(("geometry", "curvature"), [("hyperbolic", 0.5), ("spherical", 0.05)])
@pytest.mark.parametrize("mode", ["dense", "tiled", "skip"])
@pytest.mark.parametrize("backend", ["cpu", "gather"])
def test_attention_equals_direct_computation(small, geometry, curvature, mode, backend):
    q, k, v = peaked(1, 4, 2, 150, 150, 12)
    tolerance = 1e-6  # what may be lost is below what is compared
    config = small.replace(
        geometry=geometry, curvature=curvature, mode=mode, backend=backend, tolerance=tolerance, control_rows=0
    )
    result = tiled_attention(q, k, v, config=config, is_causal=True)
    assert result.path == mode
    expected = direct(q.double(), k.double(), v.double(), geometry, curvature).float()
    assert torch.allclose(result.output, expected, atol=2e-4)


def test_hyperbolic_attention_is_tiled_within_its_tolerance(small):
    q, k, v = peaked(1, 4, 2, 400, 400, 12)
    result = tiled_attention(q, k, v, config=small.replace(geometry="hyperbolic"), is_causal=True)
    assert result.path == "tiled" and float(result.tile_map.density.mean()) < 0.9
    assert float(result.audit.mean.mean()) < small.tolerance * 1.5
