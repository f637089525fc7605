from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import (
    REAL,
    attention,
    batches,
    density,
    dtypes,
    few,
    gaussian,
    generator,
    hermitian,
    seeds,
    state,
    tolerance,
    unitary,
)

from aat_hf.quantum import fidelity, measurement, operators, path_integral, states


def trine():
    """Three symmetric directions of a qubit, each with weight 2/3: a POVM that is no projective measurement."""
    angles = torch.arange(3, dtype=torch.float64) * math.pi / 3
    return 2 / 3 * states.projector(torch.stack((angles.cos(), angles.sin()), -1))


@few
@given(batches, st.integers(1, 7), dtypes, seeds)
def test_projective_measurement_in_a_basis(batch, n, dtype, seed):
    psi = state((*batch, n), dtype, seed)
    basis = unitary(n, seed)  # columns
    outcomes = measurement.measure(psi, states.projector(basis.mT))
    amplitudes = psi.to(basis.dtype) @ basis.conj()
    atol = tolerance(dtype, 1e-6, 1e-13)
    torch.testing.assert_close(outcomes.probabilities.double(), amplitudes.abs() ** 2, rtol=0, atol=atol)
    torch.testing.assert_close(outcomes.probabilities.sum(-1).double(), torch.ones(batch).double(), rtol=0, atol=atol)
    after = fidelity.fidelity(outcomes.states, basis.mT)
    assert after[outcomes.probabilities > 1e-6].sub(1).abs().le(1e-5).all()
    mixed = measurement.measure_density(states.projector(psi), states.projector(basis.mT))
    torch.testing.assert_close(mixed.probabilities, outcomes.probabilities, rtol=0, atol=1e-6)
    expected = states.projector(outcomes.states)[outcomes.probabilities > 1e-3]
    torch.testing.assert_close(mixed.states[mixed.probabilities > 1e-3], expected, rtol=0, atol=1e-4)


@few
@given(batches, dtypes, seeds)
def test_povm(batch, dtype, seed):
    effects = trine()
    measurement.check_povm(effects)
    psi = state((*batch, 2), dtype, seed)
    p = measurement.born_probabilities(psi, effects)
    torch.testing.assert_close(p.sum(-1), torch.ones(batch, dtype=torch.float64), rtol=0, atol=1e-6)
    directions = effects.diagonal(dim1=-2, dim2=-1).mul(1.5).sqrt() * torch.tensor([[1, 1], [1, 1], [-1, 1]])
    by_hand = 2 / 3 * (directions.to(torch.complex128) @ psi.to(torch.complex128)[..., None])[..., 0].abs() ** 2
    torch.testing.assert_close(p, by_hand, rtol=0, atol=1e-6)
    rho = states.projector(psi).to(torch.complex128)
    torch.testing.assert_close(measurement.mixed_probabilities(rho, effects), p, rtol=0, atol=1e-6)
    after = measurement.measure(psi, (effects * 1.5).to(dtype) * (2 / 3) ** 0.5)
    torch.testing.assert_close(after.probabilities.double(), p, rtol=0, atol=2e-6)


def test_sets_that_are_no_povm_are_refused():
    negative = torch.stack((torch.diag(torch.tensor([1.5, 0.0])), torch.diag(torch.tensor([-0.5, 1.0]))))
    skew = torch.tensor([[0.0, 0.3], [0.0, 0.0]])
    for bad, fault in [
        (trine()[:2], "identity"),
        (trine() * float("nan"), "identity"),
        (negative, "semidefinite"),
        (torch.stack((torch.eye(2) / 2 + skew, torch.eye(2) / 2 - skew)), "Hermitian"),
    ]:
        with pytest.raises(ValueError, match=fault):
            measurement.check_povm(bad)


def test_outcomes_of_probability_zero_leave_the_zero_state():
    psi = torch.tensor([1.0, 0.0], requires_grad=True)
    projectors = measurement.tile_projectors(2, 1)
    outcomes = measurement.measure(psi, projectors)
    assert outcomes.probabilities.tolist() == [1, 0] and outcomes.states.tolist() == [[1, 0], [0, 0]]
    (outcomes.probabilities.sum() + outcomes.states.sum()).backward()
    assert psi.grad is not None and psi.grad.isfinite().all()
    mixed = measurement.measure_density(torch.diag(torch.tensor([1.0, 0.0])), projectors)
    assert mixed.probabilities.tolist() == [1, 0] and not mixed.states[1].any()


@few
@given(batches, st.integers(1, 7), seeds)
def test_expectations(batch, n, seed):
    psi, h = state((*batch, n), torch.complex128, seed), hermitian((n,), torch.complex128, seed + 1)
    value = measurement.expectation(psi, h)
    levels, vectors = torch.linalg.eigh(h)
    by_spectrum = ((psi @ vectors.conj()).abs() ** 2 * levels).sum(-1)
    torch.testing.assert_close(value, by_spectrum.to(value.dtype))
    torch.testing.assert_close(measurement.mixed_expectation(states.projector(psi), h), value)


def test_sampling_follows_born_and_its_generator():
    p = attention((2, 6), 0, 1.0)
    drawn = measurement.sample(p, 20000, generator(1))
    assert drawn.shape == (2, 20000) and drawn.dtype == torch.int64
    for row, expected in zip(drawn, p, strict=True):
        counts = torch.bincount(row, minlength=6)
        assert scipy.stats.chisquare(counts.numpy(), (20000 * expected).numpy()).pvalue > 1e-4
    assert torch.equal(drawn, measurement.sample(p, 20000, generator(1)))
    assert not torch.equal(drawn, measurement.sample(p, 20000, generator(2)))
    certain = measurement.sample(torch.tensor([0.0, 3.0, 0.0]), 50)
    assert certain.tolist() == [1] * 50
    with pytest.raises(RuntimeError):
        measurement.sample(torch.zeros(3), 1)


@few
@given(batches, st.integers(1, 23), st.integers(1, 8), st.sampled_from(REAL), seeds)
def test_tiles(batch, keys, tile, dtype, seed):
    p = attention((*batch, keys), seed).to(dtype)
    psi = states.from_probabilities(p)
    masses = measurement.tile_probabilities(psi, tile)
    projectors = measurement.tile_projectors(keys, tile, dtype)
    measurement.check_povm(projectors)
    atol = tolerance(dtype, 2e-6, 1e-14)
    by_hand = torch.stack([part.sum(-1) for part in p.split(tile, -1)], -1)
    torch.testing.assert_close(masses, by_hand, rtol=0, atol=atol)
    torch.testing.assert_close(masses, measurement.born_probabilities(psi, projectors), rtol=0, atol=atol)
    chosen = gaussian(masses.shape, dtype, seed) > 0
    kept = chosen.repeat_interleave(tile, -1)[..., :keys]
    mass, after = measurement.project_tiles(psi, kept)
    torch.testing.assert_close(mass, (p * kept).sum(-1), rtol=0, atol=atol)
    torch.testing.assert_close(after**2, p * kept / mass.clamp(min=1e-30)[..., None], rtol=0, atol=4 * atol)
    some = mass > 0
    torch.testing.assert_close(fidelity.fidelity(psi, after)[some], mass[some], rtol=0, atol=2 * atol)


@few
@given(batches, st.integers(2, 23), st.integers(1, 8), st.sampled_from(REAL), seeds)
def test_dropping_tiles_moves_the_output_by_the_lost_mass(batch, keys, tile, dtype, seed):
    """o - o' = (1 - m) (o of the dropped - o'), so that |o - o'| <= (1 - m) diam V."""
    p, v = attention((*batch, keys), seed).to(dtype), gaussian((keys, 5), dtype, seed + 1)
    kept = (torch.arange(keys) // tile) % 2 == 0
    psi = states.from_probabilities(p)
    mass, after = measurement.project_tiles(psi, kept)
    lost, rest = measurement.project_tiles(psi, ~kept)
    atol = tolerance(dtype, 1e-5, 1e-12)
    torch.testing.assert_close(mass + lost, torch.ones_like(mass), rtol=0, atol=atol)
    output, sparse, dropped = (x @ v for x in (p, after.square(), rest.square()))
    torch.testing.assert_close(output - sparse, lost[..., None] * (dropped - sparse), rtol=0, atol=atol)
    some = mass > 0
    error = (output - sparse).norm(dim=-1)
    assert (error <= lost * torch.cdist(v, v).max() + atol)[some].all()


@few
@given(st.integers(1, 9), st.integers(1, 4), dtypes, seeds)
def test_pinching_is_the_unread_tile_measurement(n, tile, dtype, seed):
    rho = density((2, n), n, dtype, seed)
    outcomes = measurement.measure_density(rho, measurement.tile_projectors(n, tile, rho.dtype))
    summed = (outcomes.probabilities[..., None, None] * outcomes.states).sum(-3)
    pinched = measurement.pinch_tiles(rho, tile)
    torch.testing.assert_close(pinched, summed, rtol=0, atol=1e-6)
    torch.testing.assert_close(pinched, measurement.pinch_tiles(pinched, tile), rtol=0, atol=0)
    states.check_density_matrix(pinched)


def test_gradients():
    x = gaussian((2, 4), torch.complex128, 0).requires_grad_()
    h = hermitian((4,), torch.complex128, 1).requires_grad_()
    operators = gaussian((3, 4, 4), torch.complex128, 2).requires_grad_()
    assert torch.autograd.gradcheck(measurement.expectation, (x, h))
    assert torch.autograd.gradcheck(measurement.measure, (x, operators))
    assert torch.autograd.gradcheck(lambda a, m: measurement.measure_density(states.projector(a), m), (x, operators))
    assert torch.autograd.gradcheck(lambda a: measurement.tile_probabilities(a, 3), (x,))
    kept = torch.tensor([True, False, True, True])
    assert torch.autograd.gradcheck(lambda a: measurement.project_tiles(a, kept), (x,))


@pytest.mark.parametrize("tile", [0, -2])
@pytest.mark.parametrize(
    "function",
    [
        measurement.tile_probabilities,
        measurement.pinch_tiles,
        lambda x, tile: measurement.tile_projectors(6, tile),
        operators.tile_average,
        operators.coarse_graining,
        path_integral.tile_transfer,
    ],
)
def test_a_tile_size_that_makes_no_tile_is_refused(function, tile):
    with pytest.raises(ValueError, match=f"at least one position, got size {tile}"):
        function(torch.eye(6), tile)
