"""What the summaries of tiles promise, against the sums over all keys that they stand for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf.geometry import fisher
from aat_hf.geometry.fisher import tile_metric
from aat_hf.kernels.coarse import merge_attention
from aat_hf.tiling.moments import Moments, append, cumulant, log_mass, merge, summarise

PRECISIONS = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


def groups(moments: Moments, index: torch.Tensor) -> Moments:
    return Moments(moments.count[:, index], moments.mean[:, :, :, index], moments.variance[:, :, :, index])


def joined(parts: list[Moments]) -> Moments:
    counts, means, variances = ([getattr(x, name) for x in parts] for name in ("count", "mean", "variance"))
    return Moments(torch.cat(counts, -1), torch.cat(means, 3), torch.cat(variances, 3))


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("keys", [64, 150])
def test_merged_moments_are_those_of_all_keys_of_the_tile_in_any_order(keys, dtype, tolerance):
    k = (torch.randn(2, 3, keys, 5) * torch.tensor([0.1, 1, 3, 10, 30])).to(dtype)
    fine = summarise(k, 64, 8)
    order = torch.randperm(8)
    pairs = joined([merge(groups(fine, pair)) for pair in order.view(4, 2)])
    ways = [merge(fine), merge(groups(fine, order)), merge(pairs)]
    for tile, start in enumerate(range(0, keys, 64)):
        inside = k[:, :, start : start + 64].double().numpy()
        for found in ways:
            assert int(found.count[tile, 0]) == inside.shape[2]
            mean, variance = (x[:, :, tile, 0].double().numpy() for x in (found.mean, found.variance))
            size = np.sqrt(inside.var(2))
            assert (np.abs(mean - inside.mean(2)) <= tolerance * size).all()
            assert (np.abs(variance - size**2) <= tolerance * size**2).all()


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    tile=st.sampled_from([(8, 1), (8, 4), (16, 16), (64, 8)]),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**20),
)
def test_appended_keys_are_as_good_as_recomputed(steps, tile, precision, seed):
    torch.manual_seed(seed)
    dtype, tolerance = precision
    key_tile, parts = tile
    size = torch.tensor([0.1, 1.0, 30.0], dtype=dtype)
    k = torch.randn(2, 1, sum(steps), 3, dtype=dtype) * size
    pieces = k.split(steps, 2)
    found = summarise(pieces[0], key_tile, parts)
    for piece in pieces[1:]:
        found = append(found, piece, key_tile)
    whole = summarise(k, key_tile, parts)
    assert torch.equal(found.count, whole.count) and found.mean.dtype == dtype
    assert found.mean.shape == whole.mean.shape == found.variance.shape
    assert ((found.mean - whole.mean).abs() <= tolerance * size).all()
    assert ((found.variance - whole.variance).abs() <= tolerance * size**2).all()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_tile_filled_key_by_key_far_from_the_origin(dtype, tolerance):
    """As in decoding; the mean holds so many digits of the offset, the variance those of the spread."""
    k = (100 + torch.randn(1, 2, 150, 4)).to(dtype)
    found = summarise(k[:, :, :70], 64, 4)
    for place in range(70, 150):
        found = append(found, k[:, :, place : place + 1], 64)
    whole = summarise(k, 64, 4)
    assert torch.equal(found.count, whole.count)
    torch.testing.assert_close(found.mean, whole.mean, rtol=tolerance, atol=0)
    torch.testing.assert_close(found.variance, whole.variance, rtol=0, atol=10 * tolerance)
    assert append(found, k[:, :, :0], 64) is found
    with pytest.raises(ValueError, match="150 keys in 3 tiles are not those of tiles of 32"):
        append(found, k, 32)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 30), max_size=4).map(sorted),
    order=st.randoms(use_true_random=False),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**20),
)
def test_metrics_of_keys_and_values_merge_in_any_order(cuts, order, precision, seed):
    """numpy.cov of keys and values side by side; the off-diagonal block are their cross moments."""
    torch.manual_seed(seed)
    dtype, tolerance = precision
    x = (torch.randn(30, 5) * torch.tensor([0.1, 1.0, 3.0, 10.0, 30.0])).to(dtype)
    parts = [x[a:b] for a, b in zip([0, *cuts], [*cuts, 30], strict=True)]
    tree = [(torch.tensor(float(len(part))), *tile_metric(part)) for part in parts]
    while len(tree) > 1:
        pair = [tree.pop(order.randrange(len(tree))) for _ in range(2)]
        weight, mean, covariance = (torch.stack(same) for same in zip(*pair, strict=True))
        tree.append((weight.sum(), *fisher.merge_tile_metrics(weight, mean, covariance)))
    weight, mean, covariance = tree[0]
    assert weight == 30 and covariance.dtype == dtype
    expected = np.cov(x.double().numpy().T, ddof=0)
    size = np.sqrt(np.diag(expected))
    assert (np.abs(mean.double().numpy() - x.double().numpy().mean(0)) <= tolerance * size).all()
    assert (np.abs(covariance.double().numpy() - expected) <= tolerance * np.outer(size, size)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_cross_moments_are_the_slope_of_a_tiles_output_in_the_query(dtype, tolerance):
    k, v, q = torch.randn(2, 9, 3).to(dtype), torch.randn(2, 9, 4).to(dtype), torch.randn(2, 3).to(dtype)
    for at in (torch.zeros_like(q), q):
        p = torch.einsum("bnd,bd->bn", k, at).softmax(-1)
        mean, metric = tile_metric(torch.cat([k, v], -1), p)
        slope = torch.func.vmap(torch.func.jacrev(lambda q, k, v: (k @ q).softmax(-1) @ v))(at, k, v)
        torch.testing.assert_close(metric[:, 3:, :3], slope, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mean[:, 3:], torch.einsum("bn,bne->be", p, v), rtol=tolerance, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 64),
    dim=st.integers(1, 6),
    size=st.floats(1e-3, 10),
    offset=st.floats(-10, 10),
    precision=st.sampled_from(PRECISIONS),
    seed=st.integers(0, 2**20),
)
def test_cumulants_bound_the_log_partition_of_a_tile(n, dim, size, offset, precision, seed):
    """0 <= K - (ln n + q mu) <= R^2 / 8 (Jensen, Hoeffding); less q' Sigma q / 2, at most R^3 / (36 sqrt 3).

    R is the range of the scores: no third central moment on it is above R^3 / (6 sqrt 3).
    """
    torch.manual_seed(seed)
    dtype, tolerance = precision
    k, q = (torch.randn(30, n, dim) + offset).to(dtype), (size * torch.randn(30, dim)).to(dtype)
    scores = torch.einsum("bnd,bd->bn", k.double(), q.double())
    exact, reach = scores.logsumexp(-1), scores.amax(-1) - scores.amin(-1)
    mean, metric = tile_metric(k)
    first = math.log(n) + torch.einsum("bd,bd->b", q, mean).double()
    second = torch.einsum("bd,bde,be->b", q, metric, q).double() / 2
    slack = tolerance * (1 + scores.abs().amax(-1) + second)
    assert (first <= exact + slack).all() and (exact <= first + reach**2 / 8 + slack).all()
    assert ((exact - first - second).abs() <= reach**3 / (36 * math.sqrt(3)) + slack).all()
    box = torch.maximum(q[:, None] * k.amax(1, keepdim=True), q[:, None] * k.amin(1, keepdim=True)).double().sum((1, 2))
    assert (exact <= math.log(n) + box + slack).all()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_log_masses_of_narrow_tiles_are_second_order(dtype, tolerance):
    """Along one coordinate the diagonal is the whole metric; far below freezing the third order is what is missing."""
    k, q = torch.randn(1, 1, 96, 1).to(dtype), (0.1 * torch.randn(1, 1, 9, 1)).to(dtype)
    scores = 0.7 * q.double() @ k.double().mT
    for tile, found in enumerate(log_mass(q, summarise(k, 32, 1), 0.7).double().unbind(-1)):
        part = scores[..., tile * 32 : tile * 32 + 32]
        reach = part.amax(-1) - part.amin(-1)
        assert ((found - part.logsumexp(-1)).abs() <= reach**3 / (36 * math.sqrt(3)) + tolerance).all()


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_the_gaussian_log_mean_rises_convexly_and_freezes_at_its_tangent(n, dtype, tolerance):
    spread = torch.linspace(0, 8, 401, dtype=torch.float64)
    found = cumulant(spread.square().to(dtype), torch.tensor(n)).double()
    assert found[0] == 0
    assert (found.diff() >= -tolerance).all() and (found.diff(n=2) >= -8 * tolerance).all()
    assert (found <= spread.square() / 2 * (1 + tolerance)).all()
    critical = math.sqrt(2 * math.log(n))
    frozen = spread > critical  # the largest of n scores: nothing above sigma sqrt(2 ln n) - ln n
    expected = critical * spread - math.log(n)
    assert torch.allclose(found[frozen], expected[frozen], rtol=tolerance, atol=tolerance)
    assert torch.allclose(found[~frozen], spread[~frozen].square() / 2, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 20), max_size=4).map(sorted),
    order=st.randoms(use_true_random=False),
    sharp=st.floats(0, 100),
    precision=st.sampled_from([(torch.float32, 1e-6), (torch.float64, 1e-13)]),
    seed=st.integers(0, 2**20),
)
def test_partial_attention_merges_to_the_whole_for_any_split_and_order(cuts, order, sharp, precision, seed):
    """Sets without keys are the identity (0, -inf)."""
    torch.manual_seed(seed)
    dtype, tolerance = precision
    s, v = sharp * torch.randn(3, 20, dtype=torch.float64), torch.randn(20, 4, dtype=torch.float64)

    def part(first, last):
        inside = s[:, first:last]
        output = inside.softmax(-1) @ v[first:last] if last > first else torch.zeros(3, 4).double()
        return output.to(dtype), inside.logsumexp(-1).to(dtype)

    parts = [part(first, last) for first, last in zip([0, *cuts], [*cuts, 20], strict=True)]
    while len(parts) > 1:  # a random tree
        a, b = (parts.pop(order.randrange(len(parts))) for _ in range(2))
        parts.append(merge_attention(a, b))
    output, lse = parts[0]
    assert output.dtype == lse.dtype == dtype
    eps = tolerance * (1 + s.abs().max())  # a log-sum-exp of this size is held to this, and weights are its exponential
    assert (lse.double() - s.logsumexp(-1)).abs().max() <= eps
    assert (output.double() - s.softmax(-1) @ v).abs().max() <= 4 * eps
