"""Checking a mask against its dense table."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from aat_hf.tiling.masks import FULL, NONE, AttentionMask

TILES = [(4, 4), (3, 5), (16, 8), (64, 64)]


def check(mask: AttentionMask, expected: Tensor, exact: bool = True) -> None:
    """Rows, counts and tile states of `mask` against the dense bool (batch, heads, queries, keys) `expected`."""
    rows = torch.arange(mask.queries)
    torch.testing.assert_close(mask.rows(rows).expand_as(expected), expected, rtol=0, atol=0)
    alive = mask.row_has_keys()
    torch.testing.assert_close(alive.expand(expected.shape[:-1]), expected.any(-1), rtol=0, atol=0)
    for query_tile, key_tile in TILES:
        counts, states = mask.counts(rows, key_tile), mask.tile_states(query_tile, key_tile)
        for i, j in itertools.product(range(states.shape[2]), range(states.shape[3])):
            below, right = slice(i * query_tile, (i + 1) * query_tile), slice(j * key_tile, (j + 1) * key_tile)
            tile = expected[:, :, below, right]
            have = states[:, :, i, j].expand(tile.shape[:2])
            assert not tile[have == NONE].any() and tile[have == FULL].all()
            if exact:
                assert (have[tile.all(-1).all(-1)] == FULL).all()
            tile_counts = counts[:, :, below, j]
            assert torch.equal(tile_counts.expand(tile.shape[:3]), tile.sum(-1))
