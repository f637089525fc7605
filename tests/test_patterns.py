from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf import patterns, tiled_attention
from aat_hf.patterns import MIXED, PATTERNS, classify, kept_cells, mass_cells, register_pattern
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import TileMap

N = 40
ROW, COL = torch.arange(N)[:, None], torch.arange(N)


def anywhere(rate: float) -> torch.Tensor:
    return torch.rand(N, N, generator=torch.Generator().manual_seed(1)) < rate


PLANTED = {
    "local": torch.zeros(N, N, dtype=torch.bool),
    "vertical": (COL == 5) | (COL == 14) | (COL == 17) | (COL == 26) | (ROW < 0),
    "slash": (ROW - COL == 4) | (ROW - COL == 11) | (ROW - COL == 24),
    "block": ROW // 10 == COL // 10,
    "dense": anywhere(0.9),
    MIXED: anywhere(0.25),
}
PERIODIC = {"slashes": (ROW - COL) % 6 == 0, "columns": (COL % 5 == 3) & (ROW >= 0)}


def tile_map(*keep: torch.Tensor, query_tile: int = 32) -> TileMap:
    """Causal tile map of 32-key tiles, one head for each of `keep`, with the first tile and the band always kept."""
    keep = torch.stack([k | ((ROW - COL).abs() <= 1) | (COL == 0) for k in keep])[None]
    keep = keep.unflatten(2, (-1, query_tile // 32)).any(3)
    states = causal_mask(32 * N, 32 * N, torch.device("cpu")).tile_states(query_tile, 32)
    return TileMap.from_dense(torch.where(keep, 2, 0).to(torch.uint8), states, query_tile, 32)


def attention(scores: torch.Tensor) -> torch.Tensor:
    return torch.softmax(scores.float().masked_fill(COL > ROW, -torch.inf), -1)


def test_tile_maps_are_named_by_what_was_planted():
    found = classify(tile_map(*PLANTED.values(), *PERIODIC.values()))
    assert found.names == [[*PLANTED, "periodic", "periodic"]]
    for scores in found.scores.values():
        assert scores.shape == (1, 8) and (scores >= -1e-6).all() and (scores <= 1 + 1e-6).all()
    for fraction in found.explained:
        assert (fraction >= -1e-3).all() and (fraction <= 1 + 1e-3).all()
    head = dict(zip([*PLANTED, *PERIODIC], range(8), strict=True))
    assert found.explained.vertical[0, head["vertical"]] > 0.99 and found.explained.slash[0, head["slash"]] > 0.99
    assert found.explained.both[0, head[MIXED]] < 0.25


def test_attention_is_named_by_what_was_planted():
    planted = {name: 6.0 * keep for name, keep in PLANTED.items() if name not in ("local", "dense", MIXED)}
    planted |= {"local": -0.8 * (ROW - COL), "sink": 7.0 * (COL == 0) + 0 * ROW, "dense": 0.3 * torch.randn(N, N)}
    planted["periodic"] = 6.0 * PERIODIC["slashes"]
    planted[MIXED] = 3 * torch.randn(N, N)
    found = classify(torch.stack([attention(s) for s in planted.values()])[None])
    assert found.names == [list(planted)]


@pytest.mark.parametrize("name", ["vertical", "slash"])
def test_query_tiles_may_be_larger_than_key_tiles(name):
    assert classify(tile_map(PLANTED[name], query_tile=64)).names == [[name]]


def test_names_do_not_depend_on_batch_head_order_or_a_constant_of_the_scores():
    scores = [6.0 * PLANTED["vertical"], 6.0 * PLANTED["slash"]]
    both = classify(torch.stack([attention(s) for s in scores])[None])
    turned = classify(torch.stack([attention(s + torch.randn(N, 1)) for s in reversed(scores)])[:, None])
    assert both.names == [["vertical", "slash"]] and turned.names == [["slash"], ["vertical"]]
    for name, score in both.scores.items():
        assert torch.allclose(score[0], turned.scores[name].flip(0)[:, 0], atol=5e-3)  # of profiles that are rounding


def test_long_attention_is_averaged_to_cells():
    n = 320
    i, j = torch.arange(n)[:, None], torch.arange(n)
    scores = (7.0 * ((j // 5) % 16 == 9)).expand(n, n).masked_fill(j > i, -torch.inf)
    assert classify(torch.softmax(scores, -1)[None, None]).names == [["periodic"]]


def test_the_mask_can_be_given():
    scores = torch.zeros(N, N).masked_fill(COL < 20, -200.0)
    weights = torch.softmax(scores, -1)[None, None]
    assert classify(weights, allowed=COL >= 20).scores["dense"].item() == pytest.approx(1.0, abs=1e-5)
    assert classify(weights, allowed=COL >= 0).scores["dense"].item() == pytest.approx(0.25, abs=1e-5)


def test_what_is_kept_of_a_map_is_enough_and_small():
    whole = tile_map(PLANTED["slash"], PLANTED["vertical"])
    cells = kept_cells(whole)
    assert cells.kept.shape == (1, 2, N, N) and cells.kept.dtype == torch.float32
    assert classify(cells).names == classify(whole).names


def test_a_users_own_pattern():
    register_pattern("second half", lambda maps: maps.mean_share(torch.arange(maps.share.shape[-1]) >= N // 2))
    try:
        weights = attention(9.0 * (COL == 30) + 0 * ROW)[None, None]
        assert classify(weights).scores["second half"].item() > 0.4
        register_pattern("second half", lambda maps: torch.ones(3))
        with pytest.raises(ValueError, match=r"'second half' gave scores \(3,\)"):
            classify(weights)
    finally:
        PATTERNS.pop("second half")
    with pytest.raises(ValueError, match="mixed"):
        register_pattern(MIXED, patterns.local)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**20))
def test_any_attention_has_finite_scores(batch, heads, queries, keys, seed):
    torch.manual_seed(seed)
    scores = torch.randn(batch, heads, queries, keys) * 10 ** float(torch.randint(-3, 3, ()))
    weights = torch.softmax(scores, -1) * (torch.rand(batch, heads, queries, 1) < 0.9)  # some rows see nothing
    found = classify(weights)
    assert all(len(row) == heads for row in found.names) and len(found.names) == batch
    for scores in found.scores.values():
        assert scores.isfinite().all() and (scores >= -1e-5).all() and (scores <= 1 + 1e-5).all()


def test_bad_attention_is_an_error():
    with pytest.raises(ValueError, match="batch, heads, queries, keys"):
        classify(torch.ones(3, 3))


def test_a_real_call_can_be_classified(small):
    q = torch.randn(1, 2, 640, 16, dtype=torch.float64)
    k = torch.randn(1, 2, 640, 16, dtype=torch.float64)
    k[:, :, 200:232] = 4 * q.mean(2, keepdim=True).sign()
    q = q + 2 * q.mean(2, keepdim=True).sign()
    result = tiled_attention(q, k, k, config=small, is_causal=True)
    assert result.path == "tiled"
    assert set(classify(result.tile_map).names[0]) <= {*PATTERNS, MIXED}


@pytest.mark.parametrize("query_tile", [32, 64])
def test_masses_of_tiles_name_heads_as_their_attention_does(query_tile):
    scores = [7.0 * (COL == 0) + 0 * ROW, -0.8 * (ROW - COL), 6.0 * PLANTED["vertical"], 6.0 * PLANTED["slash"]]
    weights = torch.stack([attention(s) for s in scores])[None]
    mass = weights.unflatten(2, (-1, query_tile // 32)).mean(3)
    states = causal_mask(32 * N, 32 * N, torch.device("cpu")).tile_states(query_tile, 32)
    found = classify(mass_cells(mass, states, query_tile, 32))
    assert found.names == classify(weights).names == [["sink", "local", "vertical", "slash"]]
