"""Narrow key tiles are joined to whole blocks of the shaders: the same pairs in fewer tiles."""

from __future__ import annotations

import gc
import math
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import CPU, MASKS, random_map
from parity import masks

from aat_hf.tiling.masks import causal_mask, full_mask
from aat_hf.tiling.tile_map import EXACT, TileMap
from aat_hf.vulkan.attention import Call
from aat_hf.vulkan.lowering import _distinct, joinable
from aat_hf.vulkan.profile import paddings_of


def lowered(tile_map, mask, **rule):
    return Call.of(tile_map, mask, 1.0, **rule)


def pairs(call, queries, keys):
    """What a call computes: bool (batch, heads, queries, keys)."""
    batch, heads, query_tiles, key_tiles = call.shape
    kept = torch.zeros(batch * heads * query_tiles, key_tiles, call.query_tile, call.key_tile, dtype=torch.bool)
    rows = torch.repeat_interleave(torch.arange(len(kept)), call.tiles.starts.diff())
    whole = torch.ones(call.query_tile, call.key_tile, dtype=torch.bool)
    for row, column, cut in zip(rows, call.tiles.columns, call.tiles.cuts, strict=True):
        assert not kept[row, column].any()  # no tile twice
        kept[row, column] = whole if cut < 0 else call.tiles.masks[cut].T[: call.query_tile].bool()
    kept = kept.unflatten(0, (batch, heads, query_tiles)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    return kept[:, :, :queries, :keys]


CASES = given(
    name=st.sampled_from(MASKS),
    queries=st.integers(1, 70),
    keys=st.integers(1, 130),
    query_tile=st.sampled_from([16, 33, 64]),
    key_tile=st.sampled_from([1, 8, 10, 16, 17, 32, 48]),
    density=st.sampled_from([0.0, 0.4, 1.0]),
)


@CASES
def test_the_pairs_stay_the_same(name, queries, keys, query_tile, key_tile, density):
    mask = masks(2, 2, queries, keys)[name]
    tile_map = random_map(mask, 2, 2, query_tile, key_tile, density)
    before = lowered(tile_map, mask)
    after = before.joined
    assert after.key_tile == joinable(key_tile) * key_tile
    assert after.shape == (*before.shape[:3], -(-before.shape[3] // joinable(key_tile)))
    assert torch.equal(pairs(after, queries, keys), pairs(before, queries, keys))
    starts, columns = after.tiles.starts.tolist(), after.tiles.columns
    assert all((columns[a:b].diff() > 0).all() for a, b in pairwise(starts))


@CASES
def test_padding_is_what_the_shaders_multiply(name, queries, keys, query_tile, key_tile, density):
    mask = masks(2, 2, queries, keys)[name]
    tile_map = random_map(mask, 2, 2, query_tile, key_tile, density)
    call, exact = lowered(tile_map, mask).joined, int((tile_map.levels == EXACT).sum())
    multiplied = len(call.tiles.columns) * math.ceil(call.key_tile / 32) * 32
    assert paddings_of(tile_map)[0] == pytest.approx(multiplied / (exact * key_tile) if exact else 1.0)


@pytest.mark.parametrize(("key_tile", "count"), [(4, 8), (8, 4), (10, 3), (16, 2), (24, 1), (32, 1), (64, 1)])
def test_as_many_as_fit_one_block(key_tile, count):
    mask = full_mask(64, 10 * 24 * key_tile, CPU)
    tile_map = TileMap.dense(mask, 1, 2, 32, key_tile)
    tiles = lowered(tile_map, mask).joined.tiles
    assert len(tiles.columns) == len(tile_map.columns) // count
    assert (tiles.cuts < 0).all() and not len(tiles.masks)


def test_the_last_tile_may_stand_alone():
    mask = full_mask(64, 75, CPU)
    tiles = lowered(TileMap.dense(mask, 1, 1, 64, 16), mask).joined.tiles
    assert tiles.columns.tolist() == [0, 1, 2] and tiles.cuts.tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    ("key_tile", "kept", "of_queries", "of_keys"),
    [(16, [0, 1], 1, 1), (16, [1, 2], 2, 1), (8, [0, 3], 2, 1), (24, [0], 4 / 3, 4 / 3), (48, [0], 4 / 3, 4 / 3)],
)
def test_paddings_of_known_maps(key_tile, kept, of_queries, of_keys):
    """The shader of dQ makes three matrix products, that of dK and dV four."""
    mask = full_mask(64, 4 * key_tile, CPU)
    levels = torch.zeros(1, 1, 1, 4, dtype=torch.uint8)
    levels[..., kept] = EXACT
    tile_map = TileMap.from_dense(levels, mask.tile_states(64, key_tile), 64, key_tile)
    assert paddings_of(tile_map) == pytest.approx((of_queries, (3 * of_queries + 4 * of_keys) / 7))


def test_tiles_of_two_blocks_are_not_joined():
    mask = full_mask(64, 64, CPU)
    levels = torch.tensor([0, EXACT, EXACT, 0], dtype=torch.uint8).expand(1, 1, 1, 4)
    tile_map = TileMap.from_dense(levels, mask.tile_states(64, 16), 64, 16)
    tiles = lowered(tile_map, mask).joined.tiles
    assert tiles.columns.tolist() == [0, 1]
    assert tiles.masks[tiles.cuts][:, ::16, 0].tolist() == [[0, 1], [1, 0]]


def test_each_distinct_mask_is_stored_once():
    """Half-present tiles of any row and head share two masks; the tiles on the diagonal of a causal call have one."""
    mask = full_mask(512, 512, CPU)
    tiles = lowered(random_map(mask, 2, 4, 32, 16, 0.5), mask).joined.tiles
    assert len(tiles.masks) == 2 and (tiles.cuts >= 0).sum() > 100
    mask = causal_mask(512, 512, CPU)
    tiles = lowered(TileMap.dense(mask, 2, 4, 32, 16), mask).joined.tiles
    assert len(tiles.masks) == 1 and (tiles.cuts == 0).sum() == 2 * 4 * 16


def test_under_the_skip_rule_tiles_stay_single():
    mask = causal_mask(64, 64, CPU)
    call = lowered(TileMap.dense(mask, 1, 2, 32, 16), mask, skip_below=-5.0)
    assert call.joined is call


@pytest.mark.parametrize("key_tile", [16, 32])
def test_a_call_is_no_part_of_a_cycle(key_tile):
    """It holds the map of a layer and step, which should go with the last reference to it."""
    mask = causal_mask(64, 64, CPU)
    call = lowered(TileMap.dense(mask, 1, 2, 32, key_tile), mask)
    parts = call.joined, call.joined.heads(0, 1, (1, 1, 2, 2))
    tiles = [part.tiles for part in (call, *parts)]
    assert all(part.tiles is kept for part, kept in zip((call, *parts), tiles, strict=True))
    alive = [weakref.ref(x) for x in (call, *parts)]
    gc.disable()
    try:
        del call, parts
        assert [x() for x in alive] == [None] * 3
    finally:
        gc.enable()


def test_a_map_without_tiles():
    mask = full_mask(40, 40, CPU)
    states = mask.tile_states(32, 16)
    tile_map = TileMap.from_dense(torch.zeros(1, 2, *states.shape[2:], dtype=torch.uint8), states, 32, 16)
    call = lowered(tile_map, mask).joined
    assert not len(call.tiles.columns) and call.tiles.starts.tolist() == [0] * 5
    assert paddings_of(tile_map) == (1, 1)


@given(st.lists(st.integers(0, 30) | st.integers(0, 2**40), max_size=50))
def test_distinct_values(values):
    """Whether they are small enough for a table or not."""
    array = np.array(values, np.int64)
    first, index = _distinct(array)
    kinds, wanted_first, wanted = np.unique(array, return_index=True, return_inverse=True)
    assert first.tolist() == wanted_first.tolist() and index.tolist() == wanted.tolist()
    assert array[first].tolist() == kinds.tolist()
