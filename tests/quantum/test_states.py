from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import REAL, attention, batches, density, dtypes, few, gaussian, seeds, state, tolerance, unitary

from aat_hf.quantum import states


@few
@given(batches, st.integers(1, 12), dtypes, seeds, st.floats(-30, 30))
def test_preparation_normalises_amplitudes_of_any_size(batch, n, dtype, seed, exponent):
    raw = gaussian((*batch, n), dtype, seed) * 10.0**exponent
    psi = states.from_amplitudes(raw)
    assert psi.dtype == dtype and psi.shape == raw.shape
    length = torch.view_as_real(psi.to(torch.complex128)).square().sum((-2, -1))
    assert (length - 1).abs().max() <= tolerance(dtype, 1e-6, 1e-14)
    assert (states.norm(psi) - 1).abs().max() <= tolerance(dtype, 1e-6, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64, torch.complex128])
def test_extreme_amplitudes(dtype):
    info = torch.finfo(dtype)
    tiny = torch.tensor([info.smallest_normal / 1024, 0.0], dtype=dtype)
    huge = torch.tensor([info.max, -info.max], dtype=dtype)
    assert states.from_amplitudes(tiny).tolist() == [1, 0]
    torch.testing.assert_close(states.from_amplitudes(huge), torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=dtype))
    assert states.norm(huge / 4) == pytest.approx(info.max / 4 * 2**0.5, rel=1e-6)
    assert states.from_amplitudes(torch.zeros(3, dtype=dtype)).tolist() == [0, 0, 0]
    assert states.norm(torch.zeros(3, dtype=dtype)) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_prepared_in_float32(dtype):
    psi = states.from_probabilities(torch.tensor([0.25, 0.75], dtype=dtype))
    assert psi.dtype == torch.float32
    torch.testing.assert_close(psi, torch.tensor([0.5, 0.75**0.5]))


@few
@given(batches, st.integers(1, 12), st.sampled_from(REAL), seeds)
def test_probabilities_and_scores_prepare_the_same_state(batch, n, dtype, seed):
    scores = 5 * gaussian((*batch, n), dtype, seed)
    phase = gaussian((*batch, n), dtype, seed + 1)
    p = torch.softmax(scores, -1)
    a, b = states.from_probabilities(p, phase), states.from_scores(scores, phase)
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance(dtype, 2e-6, 1e-14))
    torch.testing.assert_close(a.abs() ** 2, p, rtol=0, atol=tolerance(dtype, 2e-6, 1e-14))
    torch.testing.assert_close(torch.angle(a * torch.exp(-1j * phase)), torch.zeros_like(p), rtol=0, atol=1e-5)


def test_rows_without_keys_are_zero_with_finite_gradients():
    scores = torch.tensor([[1.0, float("-inf"), 2.0], [float("-inf")] * 3], requires_grad=True)
    psi = states.from_scores(scores)
    assert psi[1].tolist() == [0, 0, 0] and psi[0, 1] == 0
    psi.square()[:, 0].sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all() and scores.grad[0, 0] > 0
    p = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 0.0]], requires_grad=True)
    states.from_probabilities(p)[:, 0].sum().backward()
    assert p.grad is not None and p.grad.isfinite().all() and p.grad[0, 0] > 0
    assert states.from_probabilities(torch.tensor([0.5, -0.5])).isnan().any()


def test_gradients_of_preparation():
    x = gaussian((2, 4), torch.complex128, 0).requires_grad_()
    s = gaussian((2, 4), torch.float64, 1).requires_grad_()
    w = gaussian((2, 4), torch.float64, 2).requires_grad_()
    assert torch.autograd.gradcheck(states.from_amplitudes, (x,))
    assert torch.autograd.gradcheck(states.norm, (x,))
    assert torch.autograd.gradcheck(states.from_scores, (s, w))
    assert torch.autograd.gradcheck(states.from_probabilities, (s.detach().exp().requires_grad_(), w))


@few
@given(batches, st.integers(1, 4), st.integers(1, 4), dtypes, seeds)
def test_partial_trace_undoes_the_tensor_product(batch, n, m, dtype, seed):
    rho, sigma = density((*batch, n), n, dtype, seed), density((*batch, m), m, dtype, seed + 1)
    joint = states.operator_product(rho, sigma)
    atol = tolerance(dtype, 1e-6, 1e-14)
    torch.testing.assert_close(states.partial_trace(joint, (n, m), (0,)), rho, rtol=0, atol=atol)
    torch.testing.assert_close(states.partial_trace(joint, (n, m), (1,)), sigma, rtol=0, atol=atol)
    torch.testing.assert_close(
        states.partial_trace(joint, (n, m), (1, 0)), states.operator_product(sigma, rho), rtol=0, atol=atol
    )
    if not batch:
        torch.testing.assert_close(joint, torch.kron(rho, sigma))


@few
@given(batches, dtypes, seeds, st.permutations([0, 1, 2]), st.integers(0, 3))
def test_reduced_state_is_the_partial_trace_of_the_projector(batch, dtype, seed, order, kept):
    dims, keep = (2, 3, 2), tuple(order[:kept])
    psi = state((*batch, 12), dtype, seed)
    expected = states.partial_trace(states.projector(psi), dims, keep)
    torch.testing.assert_close(
        states.reduced_state(psi, dims, keep), expected, rtol=0, atol=tolerance(dtype, 1e-6, 1e-14)
    )
    torch.testing.assert_close(torch.einsum("...ii->...", expected).real, torch.ones(batch, dtype=dtype.to_real()))


def test_joint_state_of_pure_states():
    a, b = state((2, 1, 3), torch.complex128, 0), state((4, 2), torch.complex128, 1)
    joint = states.tensor_product(a, b)
    assert joint.shape == (2, 4, 6)
    torch.testing.assert_close(joint[1, 2], torch.kron(a[1, 0], b[2]))
    bell = torch.tensor([1.0, 0, 0, 1]) / 2**0.5
    torch.testing.assert_close(states.reduced_state(bell, (2, 2), (0,)), torch.eye(2) / 2)


def test_subsystems_that_do_not_fit_are_refused():
    rho = density((6,), 6, torch.float64, 0)
    with pytest.raises(ValueError, match=r"make 8 dimensions, the state has 6"):
        states.partial_trace(rho, (2, 4), (0,))
    for keep in [(2,), (0, 0), (-1,)]:
        with pytest.raises(ValueError, match="distinct subsystems out of 2"):
            states.reduced_state(rho[0], (2, 3), keep)


@few
@given(st.integers(1, 9), st.integers(1, 9), dtypes, seeds)
def test_gram_and_density_matrix_share_their_spectrum(m, n, dtype, seed):
    psi, weights = state((m, n), dtype, seed), torch.softmax(gaussian((m,), dtype.to_real(), seed), -1)
    gram, rho = states.gram_matrix(psi, weights), states.density_matrix(psi, weights)
    by_hand = sum(weights[i] * torch.outer(psi[i], psi[i].conj()) for i in range(m))
    torch.testing.assert_close(rho, by_hand, rtol=0, atol=1e-6)
    a, b = torch.linalg.eigvalsh(gram).flip(0), torch.linalg.eigvalsh(rho).flip(0)
    both = min(m, n)
    torch.testing.assert_close(a[:both], b[:both], rtol=0, atol=tolerance(dtype, 2e-6, 1e-13))
    assert a[both:].abs().sum() + b[both:].abs().sum() <= tolerance(dtype, 1e-5, 1e-12)
    states.check_density_matrix(rho)


def test_density_matrix_of_a_head_leaves_out_rows_without_keys():
    rows = attention((2, 5, 7), 0)
    dead = rows.clone()
    dead[:, 2:4] = 0
    rho = states.head_density(dead)
    torch.testing.assert_close(rho, states.head_density(rows[:, [0, 1, 4]]))
    states.check_density_matrix(rho, 1e-12)
    assert (states.head_density(torch.zeros(1, 2, 3)) == 0).all()


@few
@given(batches, st.integers(1, 6), st.integers(1, 6), dtypes, seeds)
def test_purification_reduces_to_the_state(batch, n, rank, dtype, seed):
    rho = density((*batch, n), min(rank, n), dtype, seed)
    psi = states.purify(rho)
    assert psi.shape == (*batch, n * n) and psi.dtype == dtype
    torch.testing.assert_close(states.reduced_state(psi, (n, n), (0,)), rho, rtol=0, atol=tolerance(dtype, 2e-6, 1e-13))
    torch.testing.assert_close(states.norm(psi), torch.ones(batch, dtype=dtype.to_real()))


def test_gradient_of_purification_at_a_degenerate_state():
    u = unitary(4, 0)
    rho = (u * torch.tensor([0.3, 0.3, 0.2, 0.2])) @ u.mH
    assert torch.autograd.gradcheck(lambda x: states.purify((x + x.mH) / 2), (rho.requires_grad_(),))
    pure = states.projector(state((4,), torch.complex128, 1)).requires_grad_()
    (gradient,) = torch.autograd.grad(states.purify(pure).real.sum(), pure)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_states_that_are_none_are_refused():
    rho = density((3,), 3, torch.complex128, 0)
    states.check_density_matrix(rho)
    for bad, fault in [
        (2 * rho, "trace 1"),
        (rho + torch.diag(torch.tensor([0.9, -0.9, 0.0])), "positive semidefinite"),
        (rho + torch.triu(torch.ones(3, 3), 1), "Hermitian"),
        (rho * float("nan"), "trace 1"),
        (rho[:2], "square"),
    ]:
        with pytest.raises(ValueError, match=fault):
            states.check_density_matrix(bad)
