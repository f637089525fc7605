from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from crystal_inputs import attention, batches, dtypes, few, gaussian, precisions, seeds, uniform, within
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.crystal import periodic


def periodic_map(cells, period, seed, dtype=torch.float64):
    """Row-stochastic map on a ring with A(i + P, j + P) = A(i, j)."""
    cell = attention(period, cells * period, seed=seed, dtype=dtype)
    return torch.cat([cell.roll(c * period, -1) for c in range(cells)])


@few
@given(batches, st.integers(1, 20), dtypes, seeds)
def test_structure_factor_is_the_sum_it_says(batch, n, dtype, seed):
    kept = uniform(*batch, n, seed=seed) < 0.6
    found = periodic.structure_factor(kept.to(dtype))
    assert found.dtype == dtype and found.shape == (*batch, n // 2 + 1)
    m, j = np.arange(n // 2 + 1)[:, None], np.arange(n)
    amplitude = (kept.double().numpy()[..., None, :] * np.exp(2j * np.pi * m * j / n)).sum(-1)
    expected = np.abs(amplitude) ** 2 / np.maximum(kept.sum(-1, keepdim=True).numpy(), 1)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=0, atol=within(dtype, 1e-5, 1e-12))
    points = torch.arange(n, dtype=dtype)[kept.reshape(-1, n)[0]]
    if len(points):
        at = periodic.structure_factor_at(points, 2 * math.pi / n * torch.arange(n // 2 + 1, dtype=dtype))
        torch.testing.assert_close(at, found.reshape(-1, n // 2 + 1)[0], rtol=0, atol=within(dtype, 1e-3, 1e-10))


@pytest.mark.parametrize("dtype", precisions)
@pytest.mark.parametrize("period, cells", [(2, 5), (7, 11), (8, 32)])
def test_a_comb_has_bragg_peaks_of_its_number_and_nothing_else(period, cells, dtype):
    n = period * cells
    comb = (torch.arange(n) % period == 1).to(dtype)
    expected = torch.zeros(n // 2 + 1, dtype=dtype)
    expected[::cells] = cells
    found = periodic.structure_factor(comb)
    torch.testing.assert_close(found, expected, rtol=0, atol=within(dtype, 1e-4, 1e-10))
    peak = periodic.bragg_peak(comb.bool())
    assert (int(peak.wavenumber), float(peak.period)) == (cells, period)
    assert float(peak.score) == pytest.approx(cells / (1 - 1 / period), rel=1e-5)


def test_random_keys_scatter_as_one_minus_their_density():
    kept = uniform(200, 512) < 0.3
    factor = periodic.structure_factor(kept)[:, 1:]
    assert float(factor.mean()) == pytest.approx(0.7, abs=0.02)
    peak = periodic.bragg_peak(kept)
    assert float(peak.score.mean()) < 2 * math.log(256)


@few
@given(st.integers(2, 12), st.floats(0, 0.2), seeds)
def test_bragg_peak_finds_the_period_of_a_comb_with_noise(period, chance, seed):
    n = 480
    comb = torch.arange(n) % period == 0
    noise = uniform(n, seed=seed) < chance / period
    peak = periodic.bragg_peak((comb ^ noise).expand(2, n), longest=24)
    assert peak.score.shape == (2,) and float(peak.period[0]) == pytest.approx(period, rel=0.05)
    # Each key put in or taken out moves the amplitude by at most 1; the comb's is less than its number between
    # wavenumbers (period 11).
    amplitude = (periodic.structure_factor(comb)[peak.wavenumber[0]] * comb.sum()).sqrt()
    least = (amplitude - noise.sum()).clamp(min=0).square()
    assert peak.height[0] * (comb ^ noise).sum() >= least * (1 - 1e-5)
    assert peak.score[0] > 2 * math.log(n / 2)  # twice the most striking of random wavenumbers


def test_a_block_is_excluded_by_the_longest_period():
    block = torch.zeros(256, dtype=torch.bool)
    block[:128] = True
    assert periodic.bragg_peak(block, longest=256).period == 256
    both = block & (torch.arange(256) % 8 == 0)
    assert periodic.bragg_peak(both, longest=32).period == 8
    with pytest.raises(ValueError, match="no wavenumber"):
        periodic.bragg_peak(block, shortest=9, longest=8)


def test_nothing_and_everything_have_no_period():
    for kept in (torch.zeros(16), torch.ones(16)):
        peak = periodic.bragg_peak(kept.bool())
        assert peak.score < 1e-6 and not periodic.structure_factor(kept)[1:].any()


def characteristic(points, values):
    """prod (z - value) over the values (n,) at points (Z,): complex (Z,)."""
    return (points[:, None] - values).prod(-1)


@few
@given(st.integers(1, 6), st.integers(1, 4), dtypes, seeds)
def test_bands_are_the_spectrum_of_the_ring(cells, period, dtype, seed):
    """With multiplicities, by the characteristic polynomials; one by one as far as rounding moves eigenvalues."""
    ring = periodic_map(cells, period, seed, dtype)
    blocks = periodic.periodic_part(ring, period)
    torch.testing.assert_close(blocks[0], ring[:period, :period], rtol=0, atol=1e-6)
    bands = periodic.bloch_bands(blocks)
    assert bands.shape == (cells, period) and bands.dtype == dtype.to_complex()
    n = cells * period
    around = 2 * torch.exp(2j * torch.pi * torch.arange(n + 1, dtype=torch.float64) / (n + 1))  # fixes all coefficients
    expected = torch.linalg.det(around[:, None, None] * torch.eye(n) - ring.double())
    found = characteristic(around, bands.flatten().to(torch.complex128))
    torch.testing.assert_close(found, expected, rtol=within(dtype, 1e-4, 1e-10), atol=0)
    values, left, right = scipy.linalg.eig(ring.double().numpy(), left=True)
    condition = 1 / np.abs((left.conj() * right).sum(0))
    for value, sensitive in zip(values, condition, strict=True):
        if sensitive < 1e5:  # beyond, rounding moves eigenvalues to more than first order
            distance = np.abs(bands.flatten().numpy() - value).min()
            assert distance <= within(dtype, 1e-4, 1e-10) + 1e-13 * sensitive
    assert abs(complex(bands[0, 0]) - 1) <= within(dtype, 1e-5, 1e-10)  # rows add up to 1


@pytest.mark.parametrize("dtype", precisions)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_bands_are_exact_for_a_nearby_map_and_move_by_roots_of_the_rounding(size, dtype):
    """A Jordan block in a cell, turned by a rotation so that nothing is exact, and coupled to the next cell."""
    turn = torch.linalg.qr(gaussian(size, size)).Q
    jordan = torch.diag(torch.full((size,), 0.5)) + torch.diag(torch.ones(size - 1), 1)
    cell = turn @ torch.stack([jordan, 0.25 * torch.eye(size), torch.zeros(size, size)]).double() @ turn.mT
    bands = periodic.bloch_bands(cell.to(dtype)).to(torch.complex128)
    kappa = 2 * torch.pi * torch.arange(3, dtype=torch.float64) / 3
    exact = 0.5 + 0.25 * torch.exp(1j * kappa)
    rounding = 16 * torch.finfo(dtype).eps
    assert ((bands - exact[:, None]).abs() <= rounding ** (1 / size)).all()
    shifted = bands[..., None, None] * torch.eye(size) - periodic.bloch_blocks(cell)[:, None]
    gap = torch.linalg.svdvals(shifted)[..., -1]  # the least change of the block that makes it an eigenvalue
    assert (gap <= rounding).all()


@few
@given(st.integers(1, 6), st.integers(1, 4), dtypes, seeds)
def test_bands_of_a_symmetric_ring_are_its_spectrum_to_rounding(cells, period, dtype, seed):
    """Eigenvalues of symmetric maps are as exact as their entries."""
    ring = periodic_map(cells, period, seed)
    ring = (ring + ring.mT).to(dtype)
    bands = periodic.bloch_bands(periodic.periodic_part(ring, period)).flatten()
    expected = torch.linalg.eigvalsh(ring.double())
    atol = within(dtype, 1e-4, 1e-10)
    torch.testing.assert_close(bands.real.double().sort().values, expected, rtol=0, atol=atol)
    assert bands.imag.abs().max() <= atol


@few
@given(batches, st.integers(1, 9), seeds)
def test_bands_of_a_circulant_are_the_transform_of_its_symbol(batch, n, seed):
    symbol = gaussian(*batch, n, seed=seed)
    i = torch.arange(n)
    ring = symbol[..., (i - i[:, None]) % n]  # A(i, j) depends on j - i
    bands = periodic.bloch_bands(periodic.periodic_part(ring, 1))[..., 0]
    expected = np.fft.ifft(symbol.numpy(), norm="forward")
    torch.testing.assert_close(bands, torch.from_numpy(expected), rtol=0, atol=1e-10)


def test_periodic_part_is_the_nearest_periodic_map():
    ring = attention(12, 12)
    blocks = periodic.periodic_part(ring, 3)
    nearest = torch.cat([torch.cat([blocks[(b - a) % 4] for b in range(4)], 1) for a in range(4)])
    torch.testing.assert_close(periodic.periodic_part(nearest, 3), blocks)
    rest = ring - nearest
    assert abs(float((rest * nearest).sum())) < 1e-12
    with pytest.raises(ValueError, match="does not divide"):
        periodic.periodic_part(ring, 5)


def test_gradients():
    w, ring = uniform(9).requires_grad_(), attention(6, 6).requires_grad_()
    assert torch.autograd.gradcheck(periodic.structure_factor, (w,))
    kappa = uniform(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(periodic.structure_factor_at, (w, kappa))
    assert torch.autograd.gradcheck(lambda a: periodic.bloch_blocks(periodic.periodic_part(a, 2)), (ring,))
    gone = torch.zeros(5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(periodic.structure_factor(gone).sum(), gone)
    assert gradient.isfinite().all()


def test_repetition_is_one_for_a_comb_and_small_for_noise():
    comb = (torch.arange(96) % 6 == 2).double() - 1 / 6
    assert periodic.repetition(comb) > 0.8
    assert (periodic.repetition(torch.randn(20, 96, dtype=torch.float64)) < 0.35).all()
    assert periodic.repetition(torch.zeros(96)) == 0
