from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import batches, density, few, gaussian, hermitian, seeds, state, tolerance

from aat_hf.quantum import _spectral, evolution, fidelity, states
from aat_hf.quantum import geometric_tensor as qgt


def qubit(angles):
    """cos(theta / 2) |0> + e^{i phi} sin(theta / 2) |1>."""
    half, phase = angles[0] / 2, torch.exp(1j * angles[1])
    return torch.stack((half.cos() + 0j * phase, half.sin() * phase))


def softmax_state(theta):
    return states.from_scores(theta)


def bloch(r):
    """Density matrix of a qubit with Bloch vector r."""
    x, y, z = r
    return torch.stack((1 + z + 0j, x - 1j * y, x + 1j * y, 1 - z + 0j)).view(2, 2) / 2


def lower_band(mass):
    """Lower band of sin kx X + sin ky Y + (mass + cos kx + cos ky) Z, up to length and phase."""

    def family(k):
        x, y, z = k[..., 0].sin(), k[..., 1].sin(), mass + k[..., 0].cos() + k[..., 1].cos()
        length = (x**2 + y**2 + z**2).sqrt()
        return torch.stack((z - length + 0j, x + 1j * y), -1)

    return family


@few
@given(batches, seeds)
def test_qubit(batch, seed):
    """Re Q = diag(1, sin^2 theta) / 4 and Omega = -sin(theta) / 2 on the Bloch sphere."""
    angles = gaussian((*batch, 2), torch.float64, seed)
    q = qgt.geometric_tensor(qubit, angles)
    sine = angles[..., 0].sin()
    torch.testing.assert_close(q.real, torch.diag_embed(torch.stack((torch.ones_like(sine), sine**2), -1)) / 4)
    torch.testing.assert_close(qgt.fubini_study_metric(qubit, angles), q.real)
    omega = qgt.berry_curvature(qubit, angles)
    torch.testing.assert_close(omega[..., 0, 1], -sine / 2)
    torch.testing.assert_close(omega, -omega.mT)
    single = qgt.geometric_tensor(qubit, angles.float())
    assert single.dtype == torch.complex64
    torch.testing.assert_close(single.to(q.dtype), q, rtol=0, atol=1e-6)


@few
@given(batches, st.integers(1, 6), seeds)
def test_softmax_rows_have_a_quarter_of_the_fisher_metric_and_no_berry_curvature(batch, n, seed):
    theta = gaussian((*batch, n), torch.float64, seed)
    p = torch.softmax(theta, -1)
    covariance = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    torch.testing.assert_close(qgt.pure_fisher_information(softmax_state, theta), covariance, rtol=0, atol=1e-14)
    single = qgt.pure_fisher_information(softmax_state, theta.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), covariance, rtol=0, atol=1e-6)
    assert not qgt.berry_curvature(softmax_state, theta).any()
    hessian = torch.func.hessian(lambda t: t.logsumexp(-1))(theta.reshape(-1, n)[0])
    torch.testing.assert_close(covariance.reshape(-1, n, n)[0], hessian, rtol=0, atol=1e-14)


@few
@given(seeds)
def test_gauge_and_length_do_not_matter(seed):
    h = hermitian((3, 4), torch.complex128, seed) / 4
    psi, theta = state((4,), torch.complex128, seed), gaussian((3,), torch.float64, seed + 1)

    def family(t):
        return evolution.evolve(psi, evolution.propagator((t[:, None, None] * h).sum(0)))

    def dressed(t):
        return family(t) * torch.exp(1j * (t.sin().sum() + t[0] * t[1])) * (2 + t[2] ** 2)

    q = qgt.geometric_tensor(family, theta)
    torch.testing.assert_close(qgt.geometric_tensor(dressed, theta), q, rtol=0, atol=1e-12)
    torch.testing.assert_close(q, q.mH)
    assert torch.linalg.eigvalsh(q).min() >= -1e-12
    step = 1e-4 * gaussian((3,), torch.float64, seed + 2)  # ds^2 = g dx dx
    measured = fidelity.fubini_study(family(theta - step / 2), family(theta + step / 2)) ** 2
    torch.testing.assert_close(measured, step @ q.real @ step, rtol=1e-5, atol=0)


def test_generators_of_a_unitary_family():
    """exp(-i t H) psi: 4 Re Q is four times the variance of H, at all t."""
    h, psi = hermitian((5,), torch.complex128, 0), state((5,), torch.complex128, 1)
    mean = (psi.conj() @ h @ psi).real
    variance = (psi.conj() @ h @ h @ psi).real - mean**2
    found = qgt.pure_fisher_information(
        lambda t: evolution.evolve(psi, evolution.propagator(h, t[0])),
        torch.tensor([[0.0], [1.3]], dtype=torch.float64),
    )
    torch.testing.assert_close(found[:, 0, 0], 4 * variance.expand(2))


def cone(theta, points):
    phi = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    return torch.func.vmap(qubit)(torch.stack((torch.full_like(phi, theta), phi), -1))


def test_berry_phase_of_a_cone_converges_in_second_order():
    theta = 1.0
    exact = -math.pi * (1 - math.cos(theta))
    errors = [abs(float(qgt.berry_phase(cone(theta, n))) - exact) for n in (16, 64, 256)]
    assert errors[2] < 1e-4
    for coarse, fine in itertools.pairwise(errors):
        assert 14 < coarse / fine < 18


@few
@given(st.integers(3, 20), seeds)
def test_berry_phase_is_gauge_invariant_and_odd(points, seed):
    loop = cone(1.0, points)
    phases = torch.exp(1j * gaussian((points, 1), torch.float64, seed))
    phase = qgt.berry_phase(loop)
    torch.testing.assert_close(qgt.berry_phase(loop * phases * 3), phase)
    torch.testing.assert_close(qgt.berry_phase(loop.roll(2, 0)), phase)
    torch.testing.assert_close(qgt.berry_phase(loop.flip(0)), -phase)
    assert qgt.berry_phase(loop.to(torch.complex64)).dtype == torch.float32
    real = states.from_scores(gaussian((2, points, 5), torch.float64, seed))
    assert not qgt.berry_phase(real).any()  # attention rows: overlaps are positive


def test_berry_phase_of_a_small_loop_is_the_curvature_through_it():
    centre, r = torch.tensor([1.1, 0.3], dtype=torch.float64), 1e-2
    angle = torch.arange(400, dtype=torch.float64) * 2 * math.pi / 400
    loop = torch.func.vmap(qubit)(centre + r * torch.stack((angle.cos(), angle.sin()), -1))
    flux = qgt.berry_curvature(qubit, centre)[0, 1] * math.pi * r**2
    assert float(qgt.berry_phase(loop)) == pytest.approx(float(flux), rel=1e-3)


def test_berry_phase_does_not_exist_for_orthogonal_neighbours():
    loop = torch.tensor([[1.0, 0], [0, 1.0], [1.0, 1.0]])
    assert qgt.berry_phase(loop).isnan()


def test_chern_numbers_are_integers_and_agree_with_the_integrated_curvature():
    momenta = (torch.arange(24, dtype=torch.float64) + 0.37) * 2 * math.pi / 24
    grid = torch.stack(torch.meshgrid(momenta, momenta, indexing="ij"), -1)
    numbers = torch.stack([qgt.chern_number(lower_band(m)(grid)) for m in (-3.0, -1.0, 1.0, 3.0)])
    torch.testing.assert_close(numbers, numbers.round(), rtol=0, atol=1e-12)
    assert numbers.round().abs().tolist() == [0, 1, 1, 0] and numbers[1] * numbers[2] < 0
    for m, number in zip((-1.0, 1.0), numbers[1:3], strict=True):
        curvature = qgt.berry_curvature(lower_band(m), grid)[..., 0, 1]
        total = curvature.sum() * (2 * math.pi / 24) ** 2 / (2 * math.pi)
        assert float(total) == pytest.approx(float(number), abs=1e-2)


@few
@given(batches, seeds)
def test_fisher_information_of_a_mixed_qubit(batch, seed):
    """Bloch vector r: |dr|^2 + (r . dr)^2 / (1 - r^2)."""
    r = gaussian((*batch, 3), torch.float64, seed)
    r = 0.95 * r / (1 + r.norm(dim=-1, keepdim=True))
    square = r.square().sum(-1)[..., None, None]
    expected = torch.eye(3, dtype=r.dtype) + r[..., :, None] * r[..., None, :] / (1 - square)
    torch.testing.assert_close(qgt.fisher_information(bloch, r), expected, rtol=1e-9, atol=1e-12)
    single = qgt.fisher_information(bloch, r.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fisher_information_of_classical_and_of_pure_states(dtype):
    theta, close = (
        gaussian((2, 4), dtype, 0),
        {"rtol": tolerance(dtype, 1e-4, 1e-9), "atol": tolerance(dtype, 1e-5, 1e-12)},
    )
    p = torch.softmax(theta, -1)
    classical = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    found = qgt.fisher_information(lambda t: torch.diag(torch.softmax(t, -1)), theta)
    torch.testing.assert_close(found, classical, **close)
    for pure, points in ((softmax_state, theta), (qubit, gaussian((3, 2), dtype, 1))):
        found = qgt.fisher_information(lambda t, f=pure: states.projector(f(t)), points)
        torch.testing.assert_close(found, qgt.pure_fisher_information(pure, points), **close)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_fisher_information_along_a_bures_geodesic(dtype):
    """Between states at the angle A it is 4 A^2 everywhere, and 1 - F = 1 - cos(A d) for any step d.

    The geodesic is w rho w with w = (sin((1 - t) A) + sin(t A) M) / sin A, where M rho M is the end (Bengtsson and
    Zyczkowski 2006, section 9.4). No curve comes nearer to its Fisher information: on another the error has further
    terms in d^2.
    """
    rho, sigma = density((4,), 4, torch.complex128, 0), density((4,), 4, torch.complex128, 1)
    root = _spectral.sqrt_psd(rho)
    inverse = torch.linalg.inv(root)
    transport = inverse @ _spectral.sqrt_psd(root @ sigma @ root) @ inverse
    angle = float(fidelity.bures_angle(rho, sigma))

    def family(t):
        weight = torch.sin((1 - t) * angle) * torch.eye(4) + torch.sin(t * angle) * transport
        return (weight @ rho @ weight / math.sin(angle) ** 2).to(dtype)

    points = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
    rel = tolerance(dtype, 1e-4, 1e-9)
    torch.testing.assert_close(family(points[2]), sigma.to(dtype), rtol=0, atol=tolerance(dtype, 1e-6, 1e-13))
    found = qgt.fisher_information(family, points).flatten().tolist()
    assert found == pytest.approx([4 * angle**2] * 3, rel=rel)
    d = 1e-2
    a, b = (family(torch.tensor([0.5 + s * d / 2], dtype=torch.float64)) for s in (-1, 1))
    ratio = 4 * float(fidelity.mixed_bures_distance(a, b)) ** 2 / d**2  # D^2 = 2 (1 - F)
    assert ratio == pytest.approx(8 * (1 - math.cos(angle * d)) / d**2, rel=rel)
    assert ratio == pytest.approx(found[1], rel=max(rel, 1e-5))


def test_fisher_information_is_the_curvature_of_bures_distance():
    """On any curve the error of the ratio is a series in d^2, which three steps take off to the sixth order."""
    start, end = density((4,), 4, torch.complex128, 0), density((4,), 3, torch.complex128, 1)

    def family(t):
        return start + t[0] * (end - start)

    found = float(qgt.fisher_information(family, torch.tensor([0.5], dtype=torch.float64)))
    ratios = []
    for d in (4e-2, 2e-2, 1e-2):
        a, b = (family(torch.tensor([0.5 + s * d / 2], dtype=torch.float64)) for s in (-1, 1))
        ratios.append(float(4 * fidelity.mixed_bures_distance(a, b) ** 2 / d**2))
    first = [(4 * fine - coarse) / 3 for coarse, fine in itertools.pairwise(ratios)]
    assert (16 * first[1] - first[0]) / 15 == pytest.approx(found, rel=1e-9)


def test_gradients():
    angles = gaussian((2, 2), torch.float64, 0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: qgt.fubini_study_metric(qubit, a), (angles,))
    assert torch.autograd.gradcheck(lambda a: qgt.berry_curvature(qubit, a), (angles,))
    r = (0.3 * gaussian((3,), torch.float64, 1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: qgt.fisher_information(bloch, a), (r,))
    loop = gaussian((4, 3), torch.complex128, 2).requires_grad_()
    assert torch.autograd.gradcheck(qgt.berry_phase, (loop,))
