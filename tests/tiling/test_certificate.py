"""Certificates against brute force: a certified cull is never wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import Largest, peaked

from aat_hf.tiling import certificate
from aat_hf.tiling.certificate import certified, certified_query_tiles, tile_bounds
from aat_hf.tiling.masks import causal_mask, full_mask
from aat_hf.tiling.measure import mean_over_query_tiles, measure_rows


def exact_rows(q, k, mask, key_tile, scale, softcap=None):
    """Tile masses (batch, heads, queries, key_tiles) and log-sum-exp of all rows."""
    return measure_rows(q, k, mask, torch.arange(q.shape[2]), key_tile, scale, softcap)


@given(
    queries=st.integers(1, 50),
    keys=st.integers(1, 70),
    tile=st.sampled_from([1, 3, 8, 16]),
    dim=st.integers(1, 9),
    causal=st.booleans(),
    sharpness=st.sampled_from([0.0, 0.3, 3.0, 100.0]),
    softcap=st.sampled_from([None, 2.0, 30.0]),
)
def test_no_tile_weighs_more_than_its_bounds(queries, keys, tile, dim, causal, sharpness, softcap):
    generator = torch.Generator().manual_seed(queries * 71 + keys)
    q = sharpness * torch.randn(1, 4, queries, dim, generator=generator, dtype=torch.float64)
    k = torch.randn(1, 2, keys, dim, generator=generator, dtype=torch.float64)
    mask = (causal_mask if causal else full_mask)(queries, keys, q.device)
    rows = exact_rows(q, k, mask, tile, 0.7, softcap)
    bounds = tile_bounds(q, k, rows.lse, 1, tile, 0.7, softcap)
    for bound in bounds:
        assert (rows.probability <= bound * (1 + 1e-12)).all()
        assert (bound <= 1).all()
    assert torch.equal(bounds.either, torch.minimum(bounds.ball, bounds.box))


@pytest.mark.parametrize("queries,keys", [(100, 100), (64, 133), (7, 50)])
@pytest.mark.parametrize("tolerance", [0.05, 0.001])
def test_a_certified_cull_is_within_the_tolerance(queries, keys, tolerance):
    q, k, _ = peaked(2, 4, 2, queries, keys, 4, torch.float64)
    mask = causal_mask(queries, keys, q.device)
    rows = exact_rows(q, k, mask, 8, 1.0)
    query_tiles = -(-queries // 16)
    padding = -queries % 16
    padded = type(rows)(
        torch.nn.functional.pad(rows.probability, (0, 0, 0, padding)),
        torch.nn.functional.pad(rows.lse, (0, padding), value=float("-inf")),
    )
    mass = mean_over_query_tiles(padded, query_tiles)
    bounds = tile_bounds(q, k, rows.lse, 16, 8, 1.0)
    assert all((mass <= bound * (1 + 1e-12)).all() for bound in bounds)
    assert (bounds.either <= torch.minimum(bounds.ball, bounds.box)).all()
    below = (bounds.either <= tolerance).sum((-1, -2))
    assert (below > 0).any() and (below < bounds.either[0, 0].numel()).all()  # the bounds say something, not all


def test_bounds_are_tight_where_the_keys_are_equal():
    k = torch.randn(1, 1, 4, 1, 3, dtype=torch.float64).expand(1, 1, 4, 8, 3).reshape(1, 1, 32, 3)
    q = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    rows = exact_rows(q, k, full_mask(5, 32, q.device), 8, 1.0)
    for bound in tile_bounds(q, k, rows.lse, 1, 8, 1.0):
        torch.testing.assert_close(bound, rows.probability)


def test_rows_in_pieces_give_the_same_in_little_memory(monkeypatch):
    q, k, _ = peaked(1, 2, 2, 500, 500, 4)
    lse = exact_rows(q, k, causal_mask(500, 500, q.device), 8, 0.5).lse
    whole = tile_bounds(q, k, lse, 16, 8, 0.5)
    monkeypatch.setattr(certificate, "_CHUNK_ELEMENTS", 2 * 16 * 63)
    with Largest() as largest:
        parts = tile_bounds(q, k, lse, 16, 8, 0.5)
    assert largest.seen <= 2 * 32 * 63  # the bounds themselves
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))


def test_rows_without_keys_count_for_nothing():
    q, k, _ = peaked(1, 1, 1, 32, 32, 4, torch.float64)
    lse = exact_rows(q, k, causal_mask(32, 32, q.device), 8, 1.0).lse
    lse[..., 20:] = -torch.inf
    found, alone = tile_bounds(q, k, lse, 16, 8, 1.0), tile_bounds(q[:, :, :20], k, lse[:, :, :20], 16, 8, 1.0)
    torch.testing.assert_close(found, alone)


def test_shares():
    bound = torch.tensor([[0.01, 0.04, 0.5], [0.03, 0.03, 0.9], [1.0, 1.0, 1.0]]).view(1, 1, 3, 3)
    culled = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool().view(1, 1, 3, 3)
    assert certified(bound, culled, 0.05).item() == pytest.approx(4 / 5)
    assert certified_query_tiles(bound, culled, 0.05).item() == pytest.approx(1 / 2)
    assert certified(bound, culled & False, 0.05).isnan().all()
