from __future__ import annotations

import math

import pytest
import torch
from crystal_inputs import batches, dtypes, few, gaussian, generator, precisions, seeds, uniform, within
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf.crystal import stability


def henon(x):
    return torch.stack([1 - 1.4 * x[0] ** 2 + x[1], 0.3 * x[0]])


def logistic(rate):
    return lambda x: rate * x * (1 - x)


def causal_attention(x):
    scores = (x @ x.mT).masked_fill(torch.ones(len(x), len(x), dtype=torch.bool).triu(1), -torch.inf)
    return scores.softmax(-1) @ x


@few
@given(batches, st.integers(1, 4), st.integers(1, 4), dtypes, seeds)
def test_jacobian_of_linear_and_of_elementwise_maps(batch, m, n, dtype, seed):
    matrix, x = gaussian(m, n, seed=seed, dtype=dtype), gaussian(*batch, n, seed=seed + 1, dtype=dtype)
    torch.testing.assert_close(stability.jacobian(lambda x: matrix @ x, x), matrix.expand(*batch, m, n))
    torch.testing.assert_close(stability.jacobian(torch.sin, x), torch.diag_embed(x.cos()))


@pytest.mark.parametrize("dtype", precisions)
def test_lyapunov_exponents_of_the_henon_map(dtype):
    start = 0.2 * uniform(20, 2, dtype=dtype)
    found = stability.lyapunov_exponents(henon, start, steps=300, discard=50)
    assert found.dtype == dtype and found.shape == (20, 2)
    # its Jacobian has determinant -0.3 everywhere
    torch.testing.assert_close(found.sum(-1), torch.full((20,), math.log(0.3), dtype=dtype), rtol=1e-5, atol=0)
    assert float(found[:, 0].mean()) == pytest.approx(0.419, abs=0.02)
    first = stability.lyapunov_exponents(henon, start, steps=100, discard=50, count=1)
    both = stability.lyapunov_exponents(henon, start, steps=100, discard=50)
    torch.testing.assert_close(first[:, 0], both[:, 0], rtol=1e-2, atol=0)


def test_lyapunov_exponents_of_the_logistic_map_at_4_are_ln_2():
    found = stability.lyapunov_exponents(logistic(4.0), torch.linspace(0.1, 0.9, 50)[:, None].double(), 300, discard=10)
    assert float(found.mean()) == pytest.approx(math.log(2), abs=0.01)


@few
@given(st.integers(1, 4), st.integers(1, 3), dtypes, seeds)
def test_exponents_of_linear_maps(n, steps, dtype, seed):
    """Triangular maps have their diagonal; the sum is ln |det| for any product."""
    upper = gaussian(n, n, seed=seed).triu(1)
    diagonal = torch.linspace(2, 0.5, n).double()
    step = (upper + torch.diag(diagonal)).to(dtype)
    found = stability.lyapunov_exponents(lambda x: step @ x, torch.ones(n, dtype=dtype), steps=steps)
    torch.testing.assert_close(found.double(), diagonal.log(), rtol=0, atol=within(dtype, 1e-4, 1e-12))
    many = gaussian(steps, 2, n, n, seed=seed, dtype=dtype)
    sums = torch.linalg.slogdet(many.double()).logabsdet.mean(0)
    exponents = stability.product_exponents(many)
    assert exponents.dtype == dtype
    torch.testing.assert_close(exponents.sum(-1).double(), sums, rtol=1e-4, atol=1e-4)


def test_product_of_equal_jacobians_has_the_logs_of_its_eigenvalues_and_a_singular_one_minus_infinity():
    matrix = gaussian(3, 3) @ torch.diag(torch.tensor([3.0, 1.0, 0.2]).double())
    matrix = matrix @ matrix.mT
    found = stability.product_exponents(matrix.expand(200, 3, 3))
    expected = torch.linalg.eigvalsh(matrix).flip(0).log()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    gone = stability.product_exponents(torch.diag(torch.tensor([2.0, 0.0])).expand(3, 2, 2))
    assert gone[0] == pytest.approx(math.log(2)) and gone[1] == -torch.inf
    flat = stability.lyapunov_exponents(lambda x: x * torch.tensor([2.0, 0.0]), torch.ones(2), 3)
    torch.testing.assert_close(flat, gone)


@pytest.mark.parametrize("dtype", precisions)
@pytest.mark.parametrize("rate", [3.1, 3.4, 3.5])
def test_floquet_multiplier_of_the_two_cycle_of_the_logistic_map(rate, dtype):
    """4 + 2 r - r^2: stable up to r = 1 + sqrt 6 = 3.449."""
    orbit = (rate + 1 + math.sqrt((rate - 3) * (rate + 1))) / (2 * rate)
    found = stability.floquet_multipliers(logistic(rate), torch.tensor([orbit], dtype=dtype), period=2)
    expected = 4 + 2 * rate - rate**2
    assert abs(complex(found[0]) - expected) <= within(dtype, 1e-4, 1e-10)
    exponent = stability.floquet_exponents(logistic(rate), torch.tensor([orbit], dtype=dtype), period=2)
    assert float(exponent.real[0]) == pytest.approx(math.log(abs(expected)) / 2, abs=within(dtype, 1e-3, 1e-9))
    assert (exponent.real[0] < 0) == (rate < 1 + math.sqrt(6))
    with pytest.raises(ValueError, match="not an orbit of period 1"):
        stability.floquet_multipliers(logistic(rate), torch.tensor([orbit], dtype=dtype))


def test_floquet_exponents_of_a_rotation_have_its_angle():
    angle = 0.3
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    found = stability.floquet_exponents(lambda x: turn @ x, torch.zeros(2, 2).double())
    assert torch.allclose(found.real, torch.zeros(2, 2).double(), atol=1e-12)
    torch.testing.assert_close(found.imag.sort().values, torch.tensor([[-angle, angle]] * 2).double())


@settings(few, max_examples=5)
@given(st.integers(1, 4), st.integers(1, 3), dtypes, seeds)
def test_largest_gain_is_the_largest_singular_value(n, d, dtype, seed):
    x = gaussian(n, d, seed=seed, dtype=dtype)
    mode = stability.largest_gain(causal_attention, x, iterations=40, generator=generator(seed))
    flat = torch.func.jacrev(causal_attention)(x).reshape(n * d, n * d).double()
    best = torch.linalg.matrix_norm(flat, 2)
    assert mode.gain <= best * (1 + 1e-5)
    torch.testing.assert_close(mode.gain.double(), best, rtol=0.1, atol=0)
    torch.testing.assert_close(
        (flat @ mode.pattern.double().flatten()), (mode.gain * mode.response).double().flatten(), rtol=1e-4, atol=1e-5
    )
    assert float(mode.pattern.norm()) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("dtype", precisions)
def test_largest_gain_converges_with_the_gap_of_the_singular_values(dtype):
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=dtype))[:, [2, 0, 1]]
    mode = stability.largest_gain(lambda x: matrix @ x, torch.zeros(3, dtype=dtype), 40, generator(1))
    assert float(mode.gain) == pytest.approx(3, rel=within(dtype, 1e-6, 1e-13))
    torch.testing.assert_close(mode.response.abs(), torch.tensor([1.0, 0, 0], dtype=dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mode.pattern.abs(), torch.tensor([0.0, 1, 0], dtype=dtype), rtol=1e-5, atol=1e-5)


def test_gain_of_a_map_that_changes_nothing_is_zero():
    mode = stability.largest_gain(lambda x: 0 * x, torch.ones(3))
    assert mode.gain == 0 and mode.pattern.isfinite().all() and mode.response.isfinite().all()


@few
@given(st.integers(1, 7), st.integers(1, 3), st.integers(1, 4), seeds)
def test_tile_response_of_causal_attention(n, d, tile, seed):
    x = gaussian(n, d, seed=seed)
    found = stability.tile_response(causal_attention, x, tile)
    assert torch.equal(found, found.tril())
    blocks = torch.func.jacrev(causal_attention)(x)
    for a in range(len(found)):
        for b in range(len(found)):
            block = blocks[a * tile : (a + 1) * tile, :, b * tile : (b + 1) * tile]
            torch.testing.assert_close(found[a, b], block.square().sum().sqrt())


def test_tile_response_agrees_with_a_real_perturbation():
    x, direction = gaussian(6, 2), torch.zeros(6, 2).double()
    direction[2:4] = gaussian(2, 2, seed=1)
    change = (causal_attention(x + 1e-6 * direction) - causal_attention(x)) / 1e-6
    bound = stability.tile_response(causal_attention, x, 2)[:, 1] * direction.norm()
    seen = change.unflatten(0, (3, 2)).square().sum((1, 2)).sqrt()
    assert (seen <= bound + 1e-5).all() and seen[0] < 1e-9 and seen[1] > 0


def test_gradients():
    x = gaussian(2, 3).requires_grad_()
    many = gaussian(2, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: stability.jacobian(torch.sin, x), (x,))
    assert torch.autograd.gradcheck(lambda x: stability.lyapunov_exponents(torch.sin, x, 3).sum(-1), (x,))
    assert torch.autograd.gradcheck(stability.product_exponents, (many,))


def test_refusals():
    with pytest.raises(ValueError, match="exponents need"):
        stability.lyapunov_exponents(torch.sin, torch.ones(2), 0)
    with pytest.raises(ValueError, match="3 directions"):
        stability.lyapunov_exponents(torch.sin, torch.ones(2), 1, count=3)
