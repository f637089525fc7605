from __future__ import annotations

import math

import pytest
import torch
from crystal_inputs import attention, batches, dtypes, few, gaussian, precisions, seeds, within
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.crystal import scales
from aat_hf.geometry.fisher import tile_metric
from aat_hf.quantum.path_integral import tile_transfer


@few
@given(batches, st.integers(1, 9), st.integers(1, 9), st.integers(2, 4), dtypes, seeds)
def test_coarsen_is_the_mean_over_queries_of_sums_over_keys(batch, queries, keys, factor, dtype, seed):
    a = attention(*batch, queries, keys, seed=seed, dtype=dtype)
    coarse = scales.coarsen(a, factor)
    assert coarse.dtype == dtype
    for i in range(coarse.shape[-2]):
        for j in range(coarse.shape[-1]):
            block = a.double()[..., i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].sum(-1).mean(-1)
            torch.testing.assert_close(coarse[..., i, j].double(), block, rtol=0, atol=within(dtype, 1e-6, 1e-14))
    torch.testing.assert_close(coarse.sum(-1), torch.ones_like(coarse[..., 0]))


@few
@given(st.integers(1, 30), st.sampled_from([2, 3]), dtypes, seeds)
def test_steps_form_a_semigroup_also_on_ragged_ends(n, factor, dtype, seed):
    a = attention(n, n, seed=seed, dtype=dtype)
    levels = scales.pyramid(a, factor)
    assert levels[-1].shape == (1, 1) and levels[0].shape == (n, n)
    for level, found in enumerate(levels):
        torch.testing.assert_close(found, tile_transfer(a, factor**level), rtol=0, atol=within(dtype, 1e-6, 1e-14))


@few
@given(batches, st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), seeds)
def test_coarse_maps_keep_the_finest_level(batch, queries, keys, factor, seed):
    levels = torch.randint(0, 3, (*batch, queries, keys), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    coarse = scales.coarsen_map(levels, factor)
    for i in range(coarse.shape[-2]):
        for j in range(coarse.shape[-1]):
            block = levels[..., i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
            assert torch.equal(coarse[..., i, j], block.amax((-2, -1)))
    assert torch.equal(scales.coarsen_map(levels > 0, factor), coarse > 0)


@pytest.mark.parametrize("dtype", precisions)
def test_octave_mass(dtype):
    uniform = torch.ones(8, 8, dtype=dtype).tril() / torch.arange(1, 9, dtype=dtype)[:, None]
    found = scales.octave_mass(uniform)
    rows = [[sum(1 for d in range(i + 1) if low <= d < high) / (i + 1) for i in range(8)]
            for low, high in ((0, 1), (1, 2), (2, 4), (4, 8))]  # fmt: skip
    torch.testing.assert_close(found, torch.tensor(rows, dtype=dtype).mean(-1))
    assert found.sum() == pytest.approx(1)
    # p ~ 1 / distance is the fixed point: every octave of the last row holds ln 2 of the harmonic sum
    distance = torch.arange(4096, dtype=dtype)
    harmonic = torch.where(distance > 0, 1 / distance.clamp(min=1), 0.0)
    both_sides = torch.cat([harmonic.flip(0), harmonic[1:]])
    ring = both_sides.unfold(0, 4096, 1)[:1]  # one query, at position 0 of its keys after the flip
    masses = scales.octave_mass(ring.flip(-1))
    assert torch.allclose(masses[5:], torch.full((8,), math.log(2), dtype=dtype), rtol=3e-2)


@few
@given(batches, st.integers(1, 20), st.integers(1, 4), st.integers(2, 3), dtypes, seeds)
def test_energies_by_scale_add_up(batch, n, d, factor, dtype, seed):
    x = 1e3 + gaussian(*batch, n, d, seed=seed, dtype=dtype)
    energies = scales.scale_energies(x, factor)
    assert energies.dtype == dtype and (energies >= 0).all()
    torch.testing.assert_close(energies.sum(-1), x.square().sum((-2, -1)), rtol=within(dtype, 1e-5, 1e-12), atol=0)
    a = attention(*batch, n, n, seed=seed, dtype=dtype)
    torch.testing.assert_close(
        scales.map_energies(a, factor).sum(-1), a.square().sum((-2, -1)), rtol=within(dtype, 1e-5, 1e-12), atol=0
    )


def test_energy_sits_where_it_was_planted():
    alternating = torch.tensor([1.0, -1.0]).repeat(16)[:, None]
    steps = torch.tensor([1.0, -1.0]).repeat_interleave(4).repeat(4)[:, None]
    constant = torch.ones(32, 1)
    for x, level in ((alternating, 0), (steps, 2), (constant, 5)):
        expected = torch.zeros(6)
        expected[level] = 32.0
        assert torch.equal(scales.scale_energies(x), expected)
        assert torch.equal(scales.map_energies(x @ x.mT), 32 * expected)


@pytest.mark.parametrize("dtype", precisions)
def test_tile_variance_of_a_ramp_and_its_exponents(dtype):
    sizes = [2, 4, 8, 16, 32, 64]
    ramp = torch.arange(1024, dtype=dtype)[:, None]
    variance = scales.tile_variance(ramp, sizes)
    h = torch.tensor(sizes, dtype=dtype)
    torch.testing.assert_close(variance, (h**2 - 1) / 12, rtol=within(dtype, 1e-4, 1e-10), atol=0)
    assert torch.allclose(scales.beta_function(h**1.5, sizes), torch.full((5,), 1.5, dtype=dtype))
    assert float(scales.scaling_exponent(h**1.5, sizes)) == pytest.approx(1.5, rel=1e-5)
    assert float(scales.beta_function(variance, sizes)[-1]) == pytest.approx(2, abs=2e-3)


@pytest.mark.parametrize("dtype", precisions)
def test_tile_variance_of_noise_and_of_a_random_walk(dtype):
    """Expectations over 64 sequences; exponents 0 and 1 at large tiles."""
    noise = gaussian(64, 4096, 1, dtype=dtype)
    sizes = [8, 16, 32, 64]
    h = torch.tensor(sizes, dtype=dtype)
    for x, law, slope in ((noise, 1 - 1 / h, 0), (noise.cumsum(-2), (h**2 - 1) / (6 * h), 1)):
        variance = scales.tile_variance(x, sizes).mean(0)
        torch.testing.assert_close(variance, law, rtol=0.03, atol=0)
        assert float(scales.scaling_exponent(variance, sizes)) == pytest.approx(slope, abs=0.1)


@few
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), seeds)
def test_tile_variance_is_the_trace_of_the_fisher_metric_of_the_tiles(tiles, h, d, seed):
    k = gaussian(tiles * h, d, seed=seed)
    trace = tile_metric(k.unflatten(0, (tiles, h)))[1].diagonal(dim1=-2, dim2=-1).sum(-1).mean()
    torch.testing.assert_close(scales.tile_variance(k, [h])[0], trace)
    torch.testing.assert_close(scales.tile_variance(k + 1e6, [h])[0], trace, rtol=1e-8, atol=1e-9)


def test_fixed_point_and_dimension_of_migdal_kadanoff_ising():
    """Bonds moved by 2, then decimated by 2 (Kadanoff 1976): K* = 0.30468..., thermal dimension 0.747."""

    def decimate(coupling):
        return torch.atanh(torch.tanh(2 * coupling) ** 2)

    for dtype in precisions:
        point = scales.fixed_point(decimate, torch.tensor([[0.3], [0.31]], dtype=dtype))
        assert torch.allclose(decimate(point), point, atol=within(dtype, 1e-6, 1e-14))
        assert float(point[1]) == pytest.approx(0.3046889, abs=1e-6)
        dimension = scales.scaling_dimensions(decimate, point, 2)
        assert dimension.shape == (2, 1) and float(dimension[0]) == pytest.approx(0.7472, abs=1e-4)
    with pytest.raises(RuntimeError, match="no fixed point"):
        scales.fixed_point(lambda x: x + 1 + x.square(), torch.full((1,), 0.1).double())


def test_scaling_dimensions_of_a_linear_step():
    step = torch.tensor([[2.0, 1.0], [0.0, 0.25]]).double()
    found = scales.scaling_dimensions(lambda x: step @ x, torch.zeros(2).double(), 2)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.0]).double())


def test_refusals():
    with pytest.raises(ValueError, match="factor"):
        scales.pyramid(torch.eye(3), 1)
    with pytest.raises(ValueError, match="member"):
        scales.coarsen(torch.eye(3), 0)


def test_gradients():
    a, x = attention(5, 5).requires_grad_(), gaussian(5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: (scales.coarsen(a), scales.octave_mass(a), scales.map_energies(a)), (a,))
    assert torch.autograd.gradcheck(
        lambda x: (scales.scale_energies(x), scales.scaling_exponent(scales.tile_variance(x, [2, 3, 5]), [2, 3, 5])),
        (x,),
    )
