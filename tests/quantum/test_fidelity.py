from __future__ import annotations

import mpmath
import pytest
import scipy.linalg
import torch
from fidelity_oracles import exact_root_fidelity, rounding_of_roots
from hypothesis import given
from hypothesis import strategies as st
from random_states import attention, batches, density, dtypes, few, gaussian, seeds, state, tolerance, unitary

from aat_hf.quantum import fidelity as fid
from aat_hf.quantum import states

PURE = [fid.fidelity, fid.infidelity, fid.fubini_study, fid.bures_distance]
MIXED = [fid.mixed_fidelity, fid.mixed_infidelity, fid.mixed_bures_distance, fid.bures_angle, fid.trace_distance]


def exact_angle(a, b):
    """Fubini-Study angle of the rays of two vectors, exactly as given, with 60 digits."""
    with mpmath.workdps(60):
        x = [mpmath.mpc(complex(v)) for v in a.tolist()]
        y = [mpmath.mpc(complex(v)) for v in b.tolist()]
        overlap = mpmath.fsum(mpmath.conj(u) * v for u, v in zip(x, y, strict=True))
        norms = mpmath.fsum(abs(u) ** 2 for u in x) * mpmath.fsum(abs(v) ** 2 for v in y)
        return mpmath.acos(min(mpmath.mpf(1), abs(overlap) / mpmath.sqrt(norms)))  # its last digit may pass 1


@few
@given(st.integers(2, 40), dtypes, seeds, st.sampled_from([0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 100.0]))
def test_pure_states_against_sixty_digits(n, dtype, seed, distance):
    a = state((n,), dtype, seed)
    b = a + distance * state((n,), dtype, seed + 1)
    angle = exact_angle(a, b)
    # In float64 the subtraction itself is exact only up to the rounding of the entries.
    rel = tolerance(dtype, 1e-6, max(1e-12, 1e-15 / distance if distance else 0))
    assert float(fid.fubini_study(a, b)) == pytest.approx(float(angle), rel=rel, abs=1e-25)
    assert float(fid.infidelity(a, b)) == pytest.approx(float(mpmath.sin(angle) ** 2), rel=2 * rel, abs=1e-25)
    assert float(fid.fidelity(a, b)) == pytest.approx(float(mpmath.cos(angle) ** 2), rel=2 * rel, abs=1e-30)
    assert float(fid.bures_distance(a, b)) == pytest.approx(float(2 * mpmath.sin(angle / 2)), rel=rel, abs=1e-25)


@few
@given(batches, st.integers(1, 40), dtypes, seeds, st.sampled_from([0.0, 1e-8, 1e-4, 0.7]))
def test_pure_invariants(batch, n, dtype, seed, distance):
    a = state((*batch, n), dtype, seed)
    b = a + distance * state((*batch, n), dtype, seed + 1)
    f, lost = fid.fidelity(a, b), fid.infidelity(a, b)
    assert f.dtype == dtype.to_real() and f.shape == batch
    assert (f <= 1).all() and (f >= 0).all() and (lost <= 1).all() and (lost >= 0).all()
    torch.testing.assert_close(f + lost, torch.ones_like(f))
    torch.testing.assert_close(fid.fidelity(b, a), f)
    assert fid.fidelity(a, a).eq(1).all()
    assert all(measure(a, a).eq(0).all() for measure in PURE[1:])
    turned = fid.fidelity(a * 3, b * (torch.exp(torch.tensor(0.7j)) if dtype.is_complex else -0.5))
    torch.testing.assert_close(turned, f)


@few
@given(st.integers(2, 40), dtypes, seeds, st.integers(-18, 18), st.integers(-18, 18))
def test_length_does_not_matter_however_different(n, dtype, seed, first, second):
    a, b = state((n,), dtype, seed), state((n,), dtype, seed + 1)
    far, near = (10.0**first * a, 10.0**second * b), (10.0**first * a, 10.0**second * a)
    for measure in PURE:
        torch.testing.assert_close(measure(*far), measure(a, b), rtol=0, atol=tolerance(dtype, 1e-6, 1e-14))
    assert fid.fubini_study(*near) <= tolerance(dtype, 2e-7, 1e-15)


def test_transforms_of_torch_func():
    a, b = state((3, 5), torch.float64, 0), state((3, 5), torch.float64, 1)
    slopes = torch.func.vmap(torch.func.grad(fid.infidelity))(a, b)
    torch.testing.assert_close(slopes, torch.func.vmap(torch.func.jacfwd(fid.infidelity))(a, b))
    rho, sigma = density((3, 4), 4, torch.float64, 0), density((3, 4), 2, torch.float64, 1)
    for measure in MIXED:
        torch.testing.assert_close(torch.func.vmap(measure)(rho, sigma), measure(rho, sigma))
        slopes = torch.func.vmap(torch.func.grad(measure))(rho, sigma)
        (expected,) = torch.autograd.grad(measure(rho.requires_grad_(), sigma).sum(), rho)
        torch.testing.assert_close(slopes, expected)


def test_orthogonal_zero_and_half_precision_states():
    a, b, zero = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), torch.zeros(2)
    assert fid.fidelity(a, b) == 0 and fid.infidelity(a, b) == 1
    assert fid.fubini_study(a, b) == pytest.approx(torch.pi / 2)
    for measure in PURE:
        x = torch.stack((a, zero)).requires_grad_()
        value = measure(x, torch.stack((a + b, b)))
        assert value[0].isfinite() and value[1].isnan()
        value[0].backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad[0].abs().sum() > 0
    assert fid.fidelity(a.bfloat16(), a.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_of_pure_measures(dtype):
    a, b = gaussian((2, 3), dtype, 0).requires_grad_(), gaussian((2, 3), dtype, 1).requires_grad_()
    for measure in PURE:
        assert torch.autograd.gradcheck(measure, (a, b))
        same = a.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(measure(same, a.detach()).sum(), same)
        assert gradient.abs().max() <= 1e-15  # an extremum: the subgradient 0


@few
@given(st.integers(2, 40), st.sampled_from([torch.float32, torch.float64]), seeds, st.integers(0, 2**31))
def test_sparse_attention_identities(n, dtype, seed, pick):
    """Keeping keys with mass m: fidelity m, total variation 1 - m, Fubini-Study angle arccos sqrt m."""
    p = attention((n,), seed).to(dtype)
    kept = torch.randperm(n, generator=torch.Generator().manual_seed(pick))[: max(1, n // 2)]
    chosen = torch.zeros(n, dtype=torch.bool).index_fill(0, kept, True)
    m = float(p.double()[chosen].sum() / p.double().sum())
    q = torch.where(chosen, p, 0) / p[chosen].sum()
    a, b = states.from_probabilities(p), states.from_probabilities(q)
    eps = tolerance(dtype, 2e-6, 1e-13)
    assert float(fid.fidelity(a, b)) == pytest.approx(m, rel=eps)
    assert float(fid.infidelity(a, b)) == pytest.approx(1 - m, rel=tolerance(dtype, 1e-3, 1e-9), abs=eps)
    assert float(fid.total_variation(p, q)) == pytest.approx(1 - m, abs=eps)
    assert float(fid.trace_distance(states.projector(a), states.projector(b))) == pytest.approx(
        (1 - m) ** 0.5, abs=1e-3
    )
    scores = p.log()
    lse, lse_kept = scores.logsumexp(0), scores[chosen].logsumexp(0)
    assert float(fid.kept_infidelity(lse_kept, lse)) == pytest.approx(1 - m, abs=2 * eps)


def test_kept_infidelity_of_edge_rows():
    inf = float("inf")
    value = fid.kept_infidelity(torch.tensor([0.0, -inf, -inf, 1 - 1e-6]), torch.tensor([0.0, 2.0, -inf, 1.0]))
    assert value.dtype == torch.float32
    tiny = fid.kept_infidelity(torch.tensor(-1e-9), torch.tensor(0.0))
    assert float(tiny) == pytest.approx(1e-9, rel=1e-6)
    assert value[:2].tolist() == [0.0, 1.0] and value[2].isnan() and 0 < value[3] < 2e-6


@few
@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 6), dtypes, seeds)
def test_mixed_fidelity_against_sixty_digits(n, rank_a, rank_b, dtype, seed):
    wide = torch.complex128 if dtype.is_complex else torch.float64
    x, y = gaussian((n, min(n, rank_a)), wide, seed), gaussian((n, min(n, rank_b)), wide, seed + 1)
    exact = exact_root_fidelity(x, y)
    rho, sigma = ((z @ z.mH).to(dtype) for z in (x, y))
    rel = tolerance(dtype, 1e-5, 1e-11)
    assert float(fid.root_fidelity(rho, sigma)) == pytest.approx(exact, rel=rel, abs=tolerance(dtype, 1e-6, 1e-14))
    assert float(fid.mixed_fidelity(rho, sigma)) == pytest.approx(exact**2, rel=2 * rel, abs=1e-12)


@few
@given(batches, st.integers(1, 6), st.integers(1, 6), dtypes, seeds)
def test_mixed_invariants(batch, n, rank, dtype, seed):
    rho = density((*batch, n), min(rank, n), dtype, seed)
    sigma = density((*batch, n), n, dtype, seed + 1)
    f = fid.mixed_fidelity(rho, sigma)
    assert f.shape == batch and f.dtype == dtype.to_real()
    assert (f <= 1).all() and (f >= 0).all()
    atol = tolerance(dtype, 2e-6, 1e-12)
    torch.testing.assert_close(f, fid.mixed_fidelity(sigma, rho), rtol=0, atol=atol)
    torch.testing.assert_close(f + fid.mixed_infidelity(rho, sigma), torch.ones_like(f), rtol=0, atol=atol)
    u = unitary(n, seed, batch)
    turned = (u @ rho.to(u.dtype) @ u.mH).to(dtype.to_complex()), (u @ sigma.to(u.dtype) @ u.mH).to(dtype.to_complex())
    slack = tolerance(dtype, 2e-5, 1e-12) + rounding_of_roots(rho, sigma, tolerance(dtype, 1.2e-7, 2.3e-16))
    assert ((fid.mixed_fidelity(*turned) - f).abs() <= slack).all()
    self_fidelity = fid.mixed_fidelity(rho, rho)
    assert (self_fidelity <= 1).all()
    torch.testing.assert_close(self_fidelity, torch.ones_like(f), rtol=0, atol=atol)
    assert all(measure(rho, rho).abs().max() <= tolerance(dtype, 1e-6, 1e-7) for measure in MIXED[1:])
    distance = fid.trace_distance(rho, sigma)  # Fuchs and van de Graaf
    assert (1 - f.sqrt() <= distance + atol).all() and (distance <= (1 - f).clamp(min=0).sqrt() + 1e-3).all()


@few
@given(st.integers(1, 8), dtypes, seeds)
def test_mixed_measures_of_pure_states_are_the_pure_ones(n, dtype, seed):
    a, b = state((n,), dtype, seed), state((n,), dtype, seed + 1)
    atol = tolerance(dtype, 1e-5, 1e-7)
    rho, sigma = states.projector(a), states.projector(b)
    for mixed, pure in zip(MIXED[:4], (*PURE[:2], PURE[3], PURE[2]), strict=True):
        torch.testing.assert_close(mixed(rho, sigma), pure(a, b), rtol=0, atol=atol)
    torch.testing.assert_close(fid.trace_distance(rho, sigma), fid.fubini_study(a, b).sin(), rtol=0, atol=1e-3)


def test_nothing_has_no_fidelity():
    zero, some = torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3)
    for measure in (*MIXED[:4], fid.root_fidelity, fid.ensemble_infidelity, fid.ensemble_bures_angle):
        assert measure(zero, some).isnan().all() and measure(some, zero).isnan().all()
        assert measure(some, some).isfinite().all()


def test_bures_distance_of_near_commuting_states():
    """Diagonal matrices: the Hellinger distance of their diagonals, relative accuracy kept at 1e-6."""
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    u = unitary(4, 0)
    for step in (1e-2, 1e-4, 1e-6):
        r = p + step * torch.tensor([1, -2, 2, -1], dtype=torch.float64) / 10
        with mpmath.workdps(40):
            pairs = zip(p.tolist(), r.tolist(), strict=True)
            exact = float(mpmath.sqrt(mpmath.fsum((mpmath.sqrt(x) - mpmath.sqrt(y)) ** 2 for x, y in pairs)))
        found = float(fid.mixed_bures_distance((u * p) @ u.mH, (u * r) @ u.mH))
        assert found == pytest.approx(exact, rel=1e-13 / step)
        assert float(fid.mixed_infidelity((u * p) @ u.mH, (u * r) @ u.mH)) == pytest.approx(exact**2, rel=step)
        assert float(fid.trace_distance((u * p) @ u.mH, (u * r) @ u.mH)) == pytest.approx(0.3 * step, rel=1e-13 / step)


def test_gradients_of_mixed_measures():
    x, y = gaussian((4, 4), torch.complex128, 0), gaussian((4, 4), torch.complex128, 1)
    for measure in (*MIXED, fid.root_fidelity):
        assert torch.autograd.gradcheck(
            lambda a, b, f=measure: f(a @ a.mH, b @ b.mH), (x.requires_grad_(), y.requires_grad_())
        )
    rho = density((4,), 2, torch.complex128, 2).requires_grad_()
    degenerate = (torch.eye(4, dtype=torch.complex128) / 4).requires_grad_()
    for measure in (*MIXED, fid.root_fidelity):
        for a, b in ((rho, degenerate), (rho, rho.detach()), (degenerate, degenerate.detach())):
            (gradient,) = torch.autograd.grad(measure(a, b), a)
            assert gradient.isfinite().all()


@few
@given(st.integers(2, 12), st.integers(1, 4), seeds)
def test_coarse_graining_never_lowers_fidelity(n, tile, seed):
    p, r = attention((n,), seed), attention((n,), seed + 1)
    index = torch.arange(n) // tile
    coarse = [torch.zeros(int(index[-1]) + 1, dtype=p.dtype).index_add(0, index, x) for x in (p, r)]
    fine = fid.fidelity(states.from_probabilities(p), states.from_probabilities(r))
    assert fid.fidelity(*(states.from_probabilities(x) for x in coarse)) >= fine - 1e-12
    assert fid.total_variation(*coarse) <= fid.total_variation(p, r) + 1e-12


def test_root_fidelity_against_scipy_square_roots():
    rho, sigma = density((8,), 8, torch.complex128, 0), density((8,), 8, torch.complex128, 1)
    root = scipy.linalg.sqrtm(rho.numpy())
    expected = scipy.linalg.sqrtm(root @ sigma.numpy() @ root).trace().real
    assert float(fid.root_fidelity(rho, sigma)) == pytest.approx(expected, rel=1e-10)
    assert float(fid.root_fidelity(rho.to(torch.complex64), sigma.to(torch.complex64))) == pytest.approx(
        expected, rel=1e-5
    )


def test_against_qutip():
    qutip = pytest.importorskip("qutip")
    rho, sigma = density((6,), 6, torch.complex128, 3), density((6,), 6, torch.complex128, 4)
    a, b = qutip.Qobj(rho.numpy()), qutip.Qobj(sigma.numpy())
    assert float(fid.root_fidelity(rho, sigma)) == pytest.approx(qutip.fidelity(a, b), rel=1e-9)
    narrow = fid.root_fidelity(rho.to(torch.complex64), sigma.to(torch.complex64))
    assert float(narrow) == pytest.approx(qutip.fidelity(a, b), rel=1e-5)
    assert float(fid.trace_distance(rho, sigma)) == pytest.approx(qutip.tracedist(a, b), rel=1e-9)
    assert float(fid.bures_angle(rho, sigma)) == pytest.approx(qutip.bures_angle(a, b), rel=1e-7)
    assert float(fid.mixed_bures_distance(rho, sigma)) == pytest.approx(qutip.bures_dist(a, b), rel=1e-7)
