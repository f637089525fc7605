from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import lorentz_distance, relative, rows
from torch.autograd import gradcheck, gradgradcheck

from aat_hf.geometry import Lorentz, lorentz, pairs

N, DIM = 30_000, 9  # more than the least


def points(dtype: torch.dtype = torch.float64, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, count, 4, dtype=dtype)
    return x, y


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    shape=st.lists(st.integers(1, 4), max_size=3),
    n=st.integers(1, 9),
    root=st.floats(1e-2, 1e2),
    size=st.floats(1e-6, 1e6),
)
def test_the_compiled_formula_is_that_of_lorentz(dtype, shape, n, root, size):
    x, y = size * torch.randn(2, *shape, n + 1, dtype=dtype)
    y = torch.where(torch.rand(*shape, 1) < 0.3, x, y)
    found = pairs.lorentz_half(x, y, root)
    u, v = (root * t[..., 1:].double() for t in (x, y))
    assert found.shape == (*shape, 1) and found.dtype == torch.float64
    same = (u == v).all(-1, keepdim=True)
    assert (found[same] == 0).all()
    # terms of size m |u - v| that cancel to the distance: see `lorentz.half`
    assert torch.allclose(
        found, lorentz.half(u, v), rtol=1e-14 * float(1 + u.norm(dim=-1).amax() + v.norm(dim=-1).amax())
    )
    assert torch.equal(found, pairs.lorentz_half(y, x, root))


@pytest.mark.parametrize("place", ["apart", "coincident", "origin"])
def test_derivatives_at_the_hard_points(place):
    x, y = points()
    x, y = {"apart": (x, y), "coincident": (x, x.clone()), "origin": (torch.zeros_like(x), y)}[place]
    x, y = (t.clone().requires_grad_(True) for t in (x, y))
    half = partial(pairs.lorentz_half, root=0.7)
    assert gradcheck(half, (x, y), check_forward_ad=True)
    assert gradgradcheck(half, (x, y))
    weight = torch.randn(len(x), 1, dtype=torch.float64)
    compiled = torch.autograd.grad(half(x, y), (x, y), weight)
    for slope, by_tensors in zip(
        compiled, torch.autograd.grad(half(x, y), (x, y), weight, create_graph=True), strict=True
    ):
        assert torch.allclose(slope, by_tensors, rtol=1e-12, atol=1e-14)


def test_it_can_be_mapped_over_and_differentiated_by_torch_func():
    x, y = points()
    half = partial(pairs.lorentz_half, root=1.0)
    assert torch.equal(torch.func.vmap(half)(x, y), half(x, y))
    assert torch.equal(torch.func.vmap(half, (None, 1))(x[0], y.mT)[:, 0], half(x[:1].expand_as(y), y)[:, 0])
    slope = torch.func.vmap(torch.func.grad(lambda x, y: half(x, y).sum()))(x, y)
    assert torch.allclose(slope[:, 1:], torch.func.vmap(torch.func.jacrev(lorentz.half))(x[:, 1:], y[:, 1:])[:, 0])


@pytest.mark.parametrize("c", [1.0, 0.4])
def test_large_batches_take_it_with_the_same_distances_and_gradients(c):
    model = Lorentz(c)
    x, y = torch.randn(2, N, DIM)
    assert pairs.suits(x, y) and not pairs.suits(x[:10], y[:10])
    assert not pairs.suits(x, y[:1]) and not pairs.suits(x, y.double())
    x.requires_grad_(True)
    d = model.dist(x, y)
    (slope,) = torch.autograd.grad(d.sum(), x)
    some = x[:50].detach().requires_grad_(True)
    few = model.dist(some, y[:50])
    (few_slope,) = torch.autograd.grad(few.sum(), some)
    assert torch.allclose(d[:50], few, rtol=1e-6) and torch.allclose(slope[:50], few_slope, rtol=1e-5, atol=1e-7)
    assert torch.equal(model.dist(x.detach(), x.detach()), torch.zeros(N))


@pytest.mark.parametrize("radius", [1e-3, 1.0, 10.0, 15.0])
def test_large_batches_against_60_digits_in_float32(radius):
    u, v = torch.nn.functional.normalize(torch.randn(2, N, DIM - 1).double(), dim=-1) * torch.tensor(radius).sinh()
    v[::2] = u[::2] * (1 + 1e-4 * torch.randn(len(u[::2]), 1))
    x, y = (torch.cat([lorentz.time(t), t], -1).float() for t in (u, v))
    exact = rows(lorentz_distance(1.0), x[:40, 1:], y[:40, 1:])
    apart = exact > 0
    assert apart.sum() > 30 and relative(Lorentz().dist(x, y)[:40][apart], exact[apart]) <= 2e-7
