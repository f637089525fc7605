from __future__ import annotations

import math

import mpmath
import pytest
import scipy.linalg
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import attention, batches, density, dtypes, few, gaussian, seeds, state, tolerance, unitary

from aat_hf.quantum import entropy, measurement, states

SPECTRA = [[1.0, 0, 0, 0], [0.25] * 4, [0.5, 0.5, 0, 0], [0.7, 0.2, 0.1, 0], [1 - 3e-9, 1e-9, 1e-9, 1e-9]]


def with_spectrum(values, dtype=torch.complex128):
    u = unitary(len(values), 7)
    return ((u * torch.tensor(values, dtype=torch.float64)) @ u.mH).to(dtype)


def shannon(values):
    with mpmath.workdps(40):
        return float(-mpmath.fsum(mpmath.mpf(v) * mpmath.log(v) for v in values if v))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_entropies_of_known_spectra(spectrum, dtype):
    rho, atol = with_spectrum(spectrum, dtype), tolerance(dtype, 3e-6, 1e-13)
    assert float(entropy.von_neumann(rho)) == pytest.approx(shannon(spectrum), abs=atol)
    assert float(entropy.effective_rank(rho)) == pytest.approx(math.exp(shannon(spectrum)), rel=4e-6)
    assert float(entropy.purity(rho)) == pytest.approx(sum(v * v for v in spectrum), abs=atol)
    assert float(entropy.renyi(rho, 2)) == pytest.approx(-math.log(sum(v * v for v in spectrum)), abs=atol)
    assert float(entropy.renyi(rho, math.inf)) == pytest.approx(-math.log(max(spectrum)), abs=atol)
    assert float(entropy.renyi(rho, 1)) == float(entropy.von_neumann(rho))
    if not 0 < min(spectrum) < 1e-6:  # what complex64 cannot tell from 0 is no rank
        half = 2 * math.log(sum(v**0.5 for v in spectrum))
        assert float(entropy.renyi(rho, 0.5)) == pytest.approx(half, abs=tolerance(dtype, 3e-6, 1e-12))
        assert float(entropy.renyi(rho, 0)) == pytest.approx(math.log(sum(v > 0 for v in spectrum)), abs=1e-6)


@few
@given(batches, st.integers(1, 8), st.integers(1, 8), dtypes, seeds)
def test_bounds_and_invariance(batch, n, rank, dtype, seed):
    rho = density((*batch, n), min(n, rank), dtype, seed)
    s, atol = entropy.von_neumann(rho), tolerance(dtype, 1e-5, 1e-12)
    assert s.shape == batch and s.dtype == dtype.to_real()
    assert (s >= -atol).all() and (s <= math.log(min(n, rank)) + atol).all()
    u = unitary(n, seed, batch)
    turned = (u @ rho.to(u.dtype) @ u.mH).to(dtype.to_complex())
    torch.testing.assert_close(entropy.von_neumann(turned), s, rtol=0, atol=atol)
    torch.testing.assert_close(entropy.von_neumann(3 * rho), s, rtol=0, atol=atol)
    orders = torch.stack([entropy.renyi(rho, a) for a in (0, 0.3, 0.9, 1, 1.1, 2, 20, math.inf)])
    assert (orders.diff(dim=0) <= 20 * atol).all()  # not increasing in the order
    pinched = entropy.von_neumann(measurement.pinch_tiles(rho, 2))
    assert (pinched >= s - atol).all()


def test_renyi_is_smooth_through_order_one_and_refuses_negative_orders():
    rho = with_spectrum([0.5, 0.3, 0.15, 0.05])
    values = [0.5, 0.3, 0.15, 0.05]
    for order in (1 - 1e-6, 1 + 1e-6, 1 - 1e-12, 1 + 1e-12, 0.51, 1.49, 1.51, 200):
        with mpmath.workdps(40):
            total = mpmath.fsum(values)  # as floats they do not add up to 1, which 1 / (1 - order) would blow up
            exact = mpmath.log(mpmath.fsum((v / total) ** order for v in values)) / (1 - mpmath.mpf(order))
        assert float(entropy.renyi(rho, order)) == pytest.approx(float(exact), rel=1e-12)
    for order in (-1.0, math.nan):
        with pytest.raises(ValueError, match="not negative"):
            entropy.renyi(rho, order)


@few
@given(st.integers(1, 9), st.integers(1, 9), dtypes, seeds)
def test_entropy_of_an_ensemble_is_that_of_its_density_matrix(m, n, dtype, seed):
    psi, weights = state((2, m, n), dtype, seed), torch.softmax(gaussian((2, m), dtype.to_real(), seed), -1)
    expected = entropy.von_neumann(states.density_matrix(psi, weights))
    torch.testing.assert_close(
        entropy.ensemble_entropy(psi, weights), expected, rtol=0, atol=tolerance(dtype, 1e-5, 1e-12)
    )


def test_heads_of_known_rank():
    same = attention((9,), 0).expand(5, 9)
    assert float(entropy.head_entropy(same)) == pytest.approx(0, abs=1e-13)
    assert float(entropy.head_entropy(torch.eye(6))) == pytest.approx(math.log(6), rel=1e-6)
    blocks = torch.block_diag(torch.full((4, 3), 1 / 3), torch.full((4, 5), 1 / 5))
    assert float(entropy.head_entropy(blocks).exp()) == pytest.approx(2, rel=1e-6)
    dead = torch.cat((blocks, torch.zeros(3, 8)))
    assert float(entropy.head_entropy(dead).exp()) == pytest.approx(2, rel=1e-6)
    rows = attention((3, 2, 5, 7), 1)
    overlaps = rows.sqrt() @ rows.sqrt().mT  # purity is the mean squared overlap of rows
    torch.testing.assert_close(entropy.purity(states.head_density(rows)), overlaps.square().mean((-2, -1)))


def test_gradients():
    x = gaussian((3, 3), torch.complex128, 0).requires_grad_()
    y = gaussian((3, 3), torch.complex128, 1).requires_grad_()
    functions = [entropy.von_neumann, entropy.purity, *(lambda r, a=a: entropy.renyi(r, a) for a in (0.5, 1.2, 3))]
    for function in functions:
        assert torch.autograd.gradcheck(lambda a, f=function: f(a @ a.mH), (x,))
    assert torch.autograd.gradcheck(lambda a, b: entropy.relative_entropy(a @ a.mH, b @ b.mH), (x, y))
    rows = attention((4, 6), 2).requires_grad_()
    assert torch.autograd.gradcheck(entropy.head_entropy, (rows,))
    z = gaussian((6, 6), torch.complex128, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: entropy.mutual_information(a @ a.mH, (2, 3)), (z,))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gradients_are_finite_and_closed_form_where_spectra_degenerate(spectrum):
    rho = with_spectrum(spectrum).requires_grad_()
    (gradient,) = torch.autograd.grad(entropy.von_neumann(rho), rho)
    values = torch.tensor(spectrum, dtype=torch.float64)
    on_support = torch.where(values > 0, -(values.clamp(min=1e-99).log() + shannon(spectrum)), 0)
    u = unitary(4, 7)
    support = (u * (values > 0)) @ u.mH
    assert gradient.isfinite().all()
    torch.testing.assert_close(support @ gradient @ support, (u * on_support) @ u.mH, rtol=0, atol=1e-6)
    for function in (
        entropy.effective_rank,
        lambda r: entropy.renyi(r, 0.5),
        lambda r: entropy.renyi(r, math.inf),
        lambda r: entropy.relative_entropy(r, torch.eye(4, dtype=r.dtype) / 4),
        lambda r: entropy.relative_entropy(r, r.detach()),
        lambda r: entropy.mutual_information(r, (2, 2)),
    ):
        (gradient,) = torch.autograd.grad(function(rho), rho)
        assert gradient.isfinite().all()


@few
@given(batches, st.integers(1, 6), dtypes, seeds)
def test_relative_entropy_of_commuting_and_random_states(batch, n, dtype, seed):
    p, r = attention((*batch, n), seed, 1.0), attention((*batch, n), seed + 1, 1.0)
    u, atol = unitary(n, seed), tolerance(dtype, 2e-5, 1e-12)
    rho, sigma = ((u * x[..., None, :]) @ u.mH for x in (p, r))
    rho, sigma = rho.to(dtype.to_complex()), sigma.to(dtype.to_complex())
    expected = torch.as_tensor(scipy.special.rel_entr(p.numpy(), r.numpy()).sum(-1))
    torch.testing.assert_close(entropy.relative_entropy(rho, sigma).double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close(entropy.relative_entropy(5 * rho, 2 * sigma).double(), expected, rtol=0, atol=atol)
    assert (entropy.relative_entropy(rho, rho) >= 0).all() and (entropy.relative_entropy(rho, rho) <= atol).all()


def test_relative_entropy_of_states_that_do_not_commute():
    rho, sigma = density((5,), 5, torch.complex128, 0), density((5,), 5, torch.complex128, 1)
    logs = scipy.linalg.logm(rho.numpy()) - scipy.linalg.logm(sigma.numpy())
    assert float(entropy.relative_entropy(rho, sigma)) == pytest.approx((rho.numpy() @ logs).trace().real, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_relative_entropy_and_supports(dtype):
    pure, mixed = with_spectrum([1.0, 0, 0], dtype), with_spectrum([0.5, 0.5, 0], dtype)
    whole = with_spectrum([0.4, 0.3, 0.3], dtype)
    atol = tolerance(dtype, 1e-5, 1e-12)
    assert float(entropy.relative_entropy(pure, mixed)) == pytest.approx(math.log(2), abs=atol)
    assert float(entropy.relative_entropy(mixed, whole)) == pytest.approx(
        0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.3), abs=atol
    )
    assert entropy.relative_entropy(mixed, pure) == math.inf
    assert entropy.relative_entropy(whole, mixed) == math.inf


@few
@given(batches, st.integers(1, 4), st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]), seeds)
def test_relative_entropy_of_rows_splits_over_tiles(batch, count, tile, dtype, seed):
    """Pythagoras: KL(p || r) = KL(p || p^) + KL(p^ || r), p^ the tile masses spread evenly, r even on every tile.

    The first part is the sum over tiles of their mass times KL(p within the tile || even).
    """
    p = attention((*batch, count * tile), seed, 1.0).to(dtype)
    masses = measurement.tile_probabilities(states.from_probabilities(p), tile)
    other = attention((*batch, count), seed + 1, 1.0).to(dtype)
    even, r = (x.repeat_interleave(tile, -1) / tile for x in (masses, other))
    total, lost, rest = (
        entropy.relative_entropy(torch.diag_embed(a), torch.diag_embed(b)) for a, b in ((p, r), (p, even), (even, r))
    )
    atol = tolerance(dtype, 1e-5, 1e-12)
    torch.testing.assert_close(total, lost + rest, rtol=0, atol=atol)
    inside = p.unflatten(-1, (count, tile)) / masses[..., None]
    by_tile = scipy.special.rel_entr(inside.double().numpy(), 1 / tile).sum(-1)
    torch.testing.assert_close(lost.double(), (masses.double() * torch.as_tensor(by_tile)).sum(-1), rtol=0, atol=atol)
    coarse = entropy.relative_entropy(torch.diag_embed(masses), torch.diag_embed(other))
    torch.testing.assert_close(coarse, rest, rtol=0, atol=atol)  # coarse graining: the part that is left,
    assert (coarse <= total + tolerance(dtype, 1e-6, 1e-12) * (1 + total)).all()  # never more than the whole


@few
@given(batches, st.integers(2, 12), st.integers(1, 4), st.sampled_from([torch.float32, torch.float64]), seeds)
def test_relative_entropy_of_kept_tiles_is_minus_the_log_of_their_mass(batch, keys, tile, dtype, seed):
    p = attention((*batch, keys), seed, 1.0).to(dtype)
    kept = (torch.arange(keys) // tile) % 2 == 0
    mass, after = measurement.project_tiles(states.from_probabilities(p), kept)
    found = entropy.relative_entropy(torch.diag_embed(after.square()), torch.diag_embed(p))
    torch.testing.assert_close(found, -mass.log(), rtol=0, atol=tolerance(dtype, 1e-5, 1e-12))


def test_mutual_information():
    bell = states.projector(torch.tensor([1.0, 0, 0, 1], dtype=torch.float64) / 2**0.5)
    assert float(entropy.mutual_information(bell, (2, 2))) == pytest.approx(2 * math.log(2), rel=1e-12)
    product = states.operator_product(density((2,), 2, torch.complex128, 0), density((3,), 3, torch.complex128, 1))
    assert float(entropy.mutual_information(product, (2, 3))) == pytest.approx(0, abs=1e-14)
    joint = attention((6,), 2)
    marginals = joint.view(2, 3).sum(1)[:, None] * joint.view(2, 3).sum(0)
    classical = scipy.special.rel_entr(joint.view(2, 3).numpy(), marginals.numpy()).sum()
    assert float(entropy.mutual_information(torch.diag(joint), (2, 3))) == pytest.approx(classical, rel=1e-12)
    with pytest.raises(ValueError, match="two subsystems, not 3"):
        entropy.mutual_information(bell, (2, 2, 1))


def test_against_qutip():
    qutip = pytest.importorskip("qutip")
    rho, sigma = density((6,), 6, torch.complex128, 3), density((6,), 6, torch.complex128, 4)
    a, b = (qutip.Qobj(x.numpy(), dims=[[2, 3], [2, 3]]) for x in (rho, sigma))
    assert float(entropy.von_neumann(rho)) == pytest.approx(qutip.entropy_vn(a), rel=1e-12)
    assert float(entropy.relative_entropy(rho, sigma)) == pytest.approx(qutip.entropy_relative(a, b), rel=1e-10)
    assert float(entropy.mutual_information(rho, (2, 3))) == pytest.approx(qutip.entropy_mutual(a, 0, 1), rel=1e-11)
