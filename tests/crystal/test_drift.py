from __future__ import annotations

import pytest
import torch
from crystal_inputs import batches, dtypes, few, gaussian, seeds, uniform, within
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.crystal import drift
from aat_hf.geometry.fisher import distance_logits


@few
@given(batches, st.integers(1, 12), st.integers(1, 4), st.floats(1e-3, 30), dtypes, seeds)
def test_no_query_drifts_farther_than_the_bound(batch, n, d, size, dtype, seed):
    k = gaussian(*batch, n, d, seed=seed, dtype=dtype)
    q, delta = gaussian(*batch, d, seed=seed + 1, dtype=dtype), size * gaussian(*batch, d, seed=seed + 2, dtype=dtype)
    bound = drift.query_drift_bound(k, delta)
    moved = distance_logits((k @ q[..., None])[..., 0], (k @ (q + delta)[..., None])[..., 0])
    assert bound.dtype == dtype and (moved <= bound + within(dtype, 1e-3, 1e-9)).all()
    shifted = drift.query_drift_bound(k + 3, delta)  # a vector added to all keys changes nothing
    torch.testing.assert_close(shifted, bound, rtol=1e-3, atol=within(dtype, 1e-4, 1e-10))


def test_the_drift_bound_is_sharp_for_two_keys_at_opposite_ends():
    """Two keys at even odds move at the speed range / 2."""
    k, delta = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([1e-3]).double()
    moved = distance_logits(k[:, 0] * 0, k[:, 0] * delta)
    assert float(moved / drift.query_drift_bound(k, delta)) == pytest.approx(1, abs=1e-6)


@few
@given(batches, st.integers(1, 8), st.floats(0, 4), dtypes, seeds)
def test_infidelity_after_drift_is_never_exceeded(batch, n, size, dtype, seed):
    s = gaussian(*batch, n, seed=seed, dtype=dtype)
    moved = s + size * gaussian(*batch, n, seed=seed + 1, dtype=dtype)
    kept = uniform(*batch, n, seed=seed + 2) < 0.7
    before, after = ((x.softmax(-1) * ~kept).sum(-1).clamp(max=1) for x in (s, moved))
    bound = drift.infidelity_after_drift(before, distance_logits(s, moved))
    assert bound.dtype == dtype and (after <= bound + within(dtype, 1e-3, 1e-7)).all() and (bound <= 1).all()
    torch.testing.assert_close(drift.infidelity_after_drift(before, torch.zeros_like(before)), before)


def test_infidelity_after_drift_keeps_small_numbers():
    tiny = torch.tensor(1e-12)
    assert float(drift.infidelity_after_drift(tiny, torch.tensor(0.0))) == pytest.approx(1e-12, rel=1e-5)
    assert drift.infidelity_after_drift(torch.tensor(0.5), torch.tensor(9.0)) == 1


def test_certified_decisions_cannot_flip():
    score, bound = gaussian(500), 0.3
    sure = drift.certified(score, 0.2, bound)
    assert 0 < sure.sum() < 500
    for error in (bound * (2 * uniform(500, seed=1) - 1), torch.tensor(bound), torch.tensor(-bound)):
        assert torch.equal((score + error >= 0.2)[sure], (score >= 0.2)[sure])
    assert not torch.equal(score + bound >= 0.2, score >= 0.2)


@few
@given(batches, st.integers(1, 5), st.integers(1, 5), seeds)
def test_jaccard(batch, queries, keys, seed):
    a, b = (uniform(*batch, queries, keys, seed=s) < 0.5 for s in (seed, seed + 1))
    found = drift.jaccard(a, b)
    sets = [[{i for i, x in enumerate(m.tolist()) if x} for m in maps.flatten(-2).reshape(-1, queries * keys)]
            for maps in (a, b)]  # fmt: skip
    expected = [len(x & y) / len(x | y) if x | y else 1.0 for x, y in zip(*sets, strict=True)]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))
    assert torch.equal(drift.jaccard(a, a), torch.ones(batch))


def test_gradients():
    k, delta = gaussian(5, 3).requires_grad_(), gaussian(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(drift.query_drift_bound, (k, delta))
    lost = torch.tensor([0.1, 0.4, 0.7]).double().requires_grad_()
    assert torch.autograd.gradcheck(
        drift.infidelity_after_drift, (lost, torch.full((3,), 0.4).double().requires_grad_())
    )
