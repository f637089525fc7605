from __future__ import annotations

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import COMPLEX, batches, density, dtypes, few, gaussian, hermitian, seeds, state, tolerance, unitary

from aat_hf.quantum import evolution, fidelity, measurement, states

SX = torch.tensor([[0, 1], [1, 0]], dtype=torch.complex128)
SY = torch.tensor([[0, -1j], [1j, 0]], dtype=torch.complex128)
SZ = torch.tensor([[1, 0], [0, -1]], dtype=torch.complex128)


def amplitude_damping(gamma):
    return torch.tensor([[[1, 0], [0, (1 - gamma) ** 0.5]], [[0, gamma**0.5], [0, 0]]], dtype=torch.complex128)


def random_channel(n, m, count, seed):
    """Kraus operators (count, m, n): blocks of a random isometry."""
    return torch.linalg.qr(gaussian((count * m, n), torch.complex128, seed)).Q.reshape(count, m, n)


@few
@given(batches, st.integers(1, 7), dtypes, seeds, st.floats(-1e4, 1e4))
def test_unitary_evolution_keeps_norms_and_can_be_reversed(batch, n, dtype, seed, time):
    h, psi = hermitian((*batch, n), dtype, seed), state((*batch, n), dtype, seed + 1)
    u = evolution.propagator(h, time)
    assert u.dtype == dtype.to_complex()
    later, atol = evolution.evolve(psi, u), tolerance(dtype, 2e-6, 1e-12)
    torch.testing.assert_close(states.norm(later), states.norm(psi), rtol=0, atol=atol)
    back = evolution.evolve(later, evolution.propagator(h, -time))
    torch.testing.assert_close(back, psi.to(back.dtype), rtol=0, atol=atol)
    rho = evolution.evolve_density(states.projector(psi), u)
    torch.testing.assert_close(rho, states.projector(later), rtol=0, atol=atol)


def test_propagator_against_scipy_and_times_in_a_batch():
    h = hermitian((5,), torch.complex128, 0)
    times = torch.tensor([0.0, 0.3, -2.0])
    batch = evolution.propagator(h, times)
    for t, u in zip(times.tolist(), batch, strict=True):
        torch.testing.assert_close(u, torch.as_tensor(scipy.linalg.expm(-1j * h.numpy() * t)), rtol=0, atol=1e-12)
    composed = evolution.propagator(h, 0.3) @ evolution.propagator(h, 0.5)
    torch.testing.assert_close(composed, evolution.propagator(h, 0.8))


def test_phase_is_kept_and_interferes():
    """(|0> + |1>) / sqrt 2 under diag(e0, e1): P(+) = cos^2((e1 - e0) t / 2), and the global phase is exp(-i e0 t)."""
    plus = torch.tensor([1.0, 1.0], dtype=torch.float64) / 2**0.5
    for t in (0.0, 0.4, 1.7):
        later = evolution.evolve(plus, evolution.propagator(torch.diag(torch.tensor([0.5, 1.9])), t))
        assert complex(later[0] * 2**0.5) == pytest.approx(complex(math.cos(0.5 * t), -math.sin(0.5 * t)), abs=1e-7)
        assert float(fidelity.fidelity(plus, later)) == pytest.approx(math.cos(0.7 * t) ** 2, abs=1e-7)


def test_rabi_oscillation():
    detuning, drive = 0.6, 0.8
    h = detuning / 2 * SZ + drive / 2 * SX
    for t in (0.1, 1.0, 5.0):
        later = evolution.evolve(torch.tensor([1.0, 0.0], dtype=torch.float64), evolution.propagator(h, t))
        expected = drive**2 / (drive**2 + detuning**2) * math.sin(math.hypot(drive, detuning) * t / 2) ** 2
        assert float(later[1].abs() ** 2) == pytest.approx(expected, abs=1e-14)


def test_gradients_also_for_degenerate_hamiltonians():
    psi = state((4,), torch.complex128, 0).requires_grad_()
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    u = unitary(4, 1)
    for h in (
        hermitian((4,), torch.complex128, 2),
        (u * torch.tensor([1.0, 1, -1, -1])) @ u.mH,
        torch.zeros(4, 4, dtype=torch.complex128),
    ):
        h = h.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda p, m, s: evolution.evolve(p, evolution.propagator((m + m.mH) / 2, s)), (psi, h, t)
        )
    rho, kraus = density((3,), 3, torch.complex128, 3).requires_grad_(), random_channel(3, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, k: evolution.apply_channel(r, k, check=False), (rho, kraus))
    assert torch.autograd.gradcheck(evolution.choi_matrix, (kraus,))


@few
@given(batches, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.sampled_from(COMPLEX), seeds)
def test_channels_make_density_matrices(batch, n, m, count, dtype, seed):
    count = max(count, -(-n // m))  # fewer operators than that cannot keep the trace
    kraus = random_channel(n, m, count, seed).to(dtype)
    rho, sigma = density((*batch, n), n, dtype, seed), density((*batch, n), n, dtype, seed + 1)
    after, other = evolution.apply_channel(rho, kraus), evolution.apply_channel(sigma, kraus)
    assert after.shape == (*batch, m, m) and after.dtype == dtype
    states.check_density_matrix(after, tolerance(dtype, 1e-5, 1e-12))
    atol = tolerance(dtype, 1e-5, 1e-9)  # no channel tells states better apart
    assert (fidelity.trace_distance(after, other) <= fidelity.trace_distance(rho, sigma) + atol).all()
    assert (fidelity.mixed_fidelity(after, other) >= fidelity.mixed_fidelity(rho, sigma) - 1e-3).all()
    choi = evolution.choi_matrix(kraus)
    assert evolution.is_cptp(choi, n)
    again = evolution.kraus_from_choi(choi, n)
    assert again.shape == (n * m, m, n)
    torch.testing.assert_close(evolution.choi_matrix(again), choi, rtol=0, atol=atol)
    torch.testing.assert_close(evolution.apply_channel(rho, again), after, rtol=0, atol=atol)


def test_known_channels():
    rho = density((2,), 2, torch.complex128, 0)
    damped = evolution.apply_channel(rho, amplitude_damping(0.3))
    a, b, d = rho[0, 0], rho[0, 1], rho[1, 1]
    torch.testing.assert_close(
        damped, torch.stack((a + 0.3 * d, 0.7**0.5 * b, 0.7**0.5 * b.conj(), 0.7 * d)).view(2, 2)
    )
    paulis = torch.stack((torch.eye(2) + 0j * SX, SX, SY, SZ)) / 2
    torch.testing.assert_close(evolution.apply_channel(rho, paulis), torch.eye(2).to(rho) / 2)
    units = torch.eye(4, dtype=torch.complex128).view(4, 2, 2)  # |i><j| / sqrt 2: other operators, the same channel
    torch.testing.assert_close(evolution.choi_matrix(paulis), evolution.choi_matrix(units / 2**0.5))
    big = density((5,), 5, torch.complex128, 1)
    pinched = evolution.apply_channel(big, measurement.tile_projectors(5, 2, torch.complex128))
    torch.testing.assert_close(pinched, measurement.pinch_tiles(big, 2))


def test_maps_that_are_no_channels_are_refused():
    rho = density((2,), 2, torch.complex128, 0)
    for bad in (0.9 * amplitude_damping(0.3), amplitude_damping(0.3)[:1], amplitude_damping(0.3) * float("nan")):
        with pytest.raises(ValueError, match="differs from the identity"):
            evolution.apply_channel(rho, bad)
    transpose = torch.zeros(4, 4)  # sum |i><j| (x) |j><i|: positive and trace preserving, not completely positive
    transpose[[0, 1, 2, 3], [0, 2, 1, 3]] = 1
    choi = evolution.choi_matrix(amplitude_damping(0.3))
    stacked = torch.stack((choi, transpose.to(choi), 0.9 * choi))
    assert evolution.is_cptp(stacked, 2).tolist() == [True, False, False]


def test_against_qutip():
    qutip = pytest.importorskip("qutip")
    h = hermitian((4,), torch.complex128, 0)
    u = (-1j * qutip.Qobj(h.numpy()) * 0.8).expm()
    torch.testing.assert_close(evolution.propagator(h, 0.8), torch.as_tensor(u.full()), rtol=0, atol=1e-12)
    kraus = random_channel(3, 3, 2, 2)
    rho = density((3,), 3, torch.complex128, 3)
    channel = qutip.kraus_to_super([qutip.Qobj(k.numpy()) for k in kraus])
    expected = torch.as_tensor(channel(qutip.Qobj(rho.numpy())).full())
    torch.testing.assert_close(evolution.apply_channel(rho, kraus), expected)
    choi = torch.as_tensor(qutip.to_choi(channel).full())
    torch.testing.assert_close(evolution.choi_matrix(kraus), choi)
