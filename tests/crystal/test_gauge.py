from __future__ import annotations

import numpy as np
import pytest
import torch
from crystal_inputs import batches, dtypes, few, gaussian, precisions, seeds, uniform, within
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.crystal import gauge


def design(queries, keys, column, offset):
    """Indicators of the terms, one row a pair."""
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(queries), torch.arange(keys), indexing="ij"))
    blocks = [torch.nn.functional.one_hot(i, queries)]
    if column:
        blocks.append(torch.nn.functional.one_hot(j, keys))
    if offset:
        blocks.append(torch.nn.functional.one_hot(i - j + keys - 1, queries + keys - 1))
    return torch.cat(blocks, -1).double()


@few
@given(st.integers(1, 7), st.integers(1, 7), st.booleans(), st.booleans(), dtypes, seeds)
def test_residual_is_that_of_least_squares(queries, keys, column, offset, dtype, seed):
    scores = 3 * gaussian(queries, keys, seed=seed, dtype=dtype)
    weight = uniform(queries, keys, seed=seed + 1) * (uniform(queries, keys, seed=seed + 2) < 0.7)
    fit = gauge.fit_scores(scores, weight, column, offset)
    root = weight.flatten().sqrt()
    x = design(queries, keys, column, offset) * root[:, None]
    y = scores.double().flatten() * root
    best = y - x @ torch.from_numpy(np.linalg.lstsq(x.numpy(), y.numpy(), rcond=1e-12)[0])
    found = fit.residual.double().flatten() * root
    torch.testing.assert_close(found, best, rtol=0, atol=within(dtype, 1e-5, 1e-6))
    rebuilt = fit.row[:, None] + fit.column + gauge.toeplitz(fit.offset, keys) + fit.residual
    torch.testing.assert_close(rebuilt[weight > 0], scores[weight > 0], rtol=0, atol=within(dtype, 1e-4, 1e-9))


@pytest.mark.parametrize("dtype", precisions)
def test_planted_terms_come_back(dtype):
    """Causal, up to the gauge: constants, and the ramp, which belongs to the offset term."""
    n = 40
    row, column, offset = gaussian(n), gaussian(n, seed=1), gaussian(2 * n - 1, seed=2)
    scores = (row[:, None] + column + gauge.toeplitz(offset, n)).to(dtype)
    weight = torch.ones(n, n).tril().bool()
    fit = gauge.fit_scores(scores, weight)
    assert fit.residual.abs().max() < within(dtype, 1e-4, 1e-6)
    position, mass = torch.arange(n).double(), weight.sum(0).double()
    basis = torch.stack([torch.ones(n).double(), position], -1)
    root = mass.sqrt()[:, None]
    trend = basis @ torch.linalg.lstsq(basis * root, column[:, None] * root).solution
    torch.testing.assert_close(fit.column.double(), column - trend[:, 0], rtol=0, atol=within(dtype, 1e-3, 1e-5))
    assert torch.equal(fit.offset[: n - 1], torch.zeros(n - 1, dtype=dtype))  # never seen


def test_alibi_is_all_slash():
    n = 24
    i = torch.arange(n).double()
    scores = -0.5 * (i[:, None] - i)
    found = gauge.explained(scores, torch.ones(n, n).tril(), 4)
    fit = gauge.fit_scores(scores, torch.ones(n, n).tril())
    assert float(found.slash) == pytest.approx(1) and fit.column.abs().max() < 1e-8
    torch.testing.assert_close(fit.offset[n - 1 :].diff(), torch.full((n - 1,), -0.5).double())


@pytest.mark.parametrize("dtype", precisions)
def test_explained_fractions_of_planted_heads(dtype):
    n, tile = 64, 8
    weight = torch.ones(n, n).tril()
    vertical = gaussian(n).expand(n, n)
    slash = gauge.toeplitz(gaussian(2 * n - 1, seed=1), n)
    block = gaussian(8, 8, seed=2).repeat_interleave(tile, 0).repeat_interleave(tile, 1)
    found = gauge.explained(torch.stack([vertical, slash, vertical + slash, block]).to(dtype), weight, tile)
    atol = within(dtype, 1e-5, 1e-8)
    assert float(found.vertical[0]) == pytest.approx(1, abs=atol) and float(found.slash[1]) == pytest.approx(
        1, abs=atol
    )
    assert float(found.both[2]) == pytest.approx(1, abs=atol) and found.vertical[2] < 0.9 and found.slash[2] < 0.9
    assert found.block[3] > 0.2 and found.block[:3].abs().max() < atol
    for part in found:
        assert part.dtype == dtype and (part >= -atol).all() and (part <= 1 + atol).all()
    assert (found.both + atol >= found.vertical).all() and (found.both + atol >= found.slash).all()


def test_what_softmax_does_not_see_and_what_the_mask_hides_changes_nothing():
    scores, weight = gaussian(2, 3, 10, 10), torch.ones(10, 10).tril()
    moved = (scores + gaussian(2, 3, 10, 1, seed=1)).masked_fill(weight == 0, -torch.inf)
    for a, b in zip(gauge.explained(scores, weight, 4), gauge.explained(moved, weight, 4), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    one = gauge.fit_scores(scores[1, 2], weight)
    torch.testing.assert_close(one.residual, gauge.fit_scores(scores, weight).residual[1, 2], rtol=0, atol=1e-7)


def test_constant_rows_are_explained_by_anything():
    found = gauge.explained(torch.ones(6, 6).cumsum(0), torch.ones(6, 6).tril(), 2)
    assert found.vertical == found.slash == found.both == 1 and found.block == 0


@few
@given(batches, st.integers(1, 7), st.integers(1, 7), seeds)
def test_diagonal_sums_and_toeplitz_are_transposes(batch, queries, keys, seed):
    x, t = gaussian(*batch, queries, keys, seed=seed), gaussian(*batch, queries + keys - 1, seed=seed + 1)
    sums = gauge.diagonal_sums(x)
    expected = [np.trace(x.numpy(), -(d - keys + 1), -2, -1) for d in range(queries + keys - 1)]
    torch.testing.assert_close(sums, torch.from_numpy(np.stack(expected, -1)))
    matrix = gauge.toeplitz(t, keys)
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    assert torch.equal(matrix, t[..., i - j + keys - 1])


def test_gradients():
    scores = gaussian(4, 4).requires_grad_()
    weight = torch.ones(4, 4).tril()
    assert torch.autograd.gradcheck(lambda s: gauge.fit_scores(s, weight).residual, (scores,), atol=1e-4)


def test_block_fraction_of_planted_blocks_and_of_noise():
    i = torch.arange(24)
    planted = torch.randn(2, 6, 6, dtype=torch.float64).repeat_interleave(4, -2).repeat_interleave(4, -1)
    weight = (i[:, None] >= i).double()
    found = gauge.block_fraction(planted, weight, [6, 3])
    assert torch.allclose(found, torch.ones(2, dtype=torch.float64))
    noise = gauge.block_fraction(torch.randn(2, 24, 24, dtype=torch.float64), weight, [6])
    assert (noise < 0.3).all() and (noise > 0).all()  # 21 blocks over 300 entries
    assert gauge.block_fraction(torch.zeros(24, 24), weight.float(), [6]) == 0
