"""The content order of keys: a permutation of clusters, repeatable, with gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.config import AATConfig
from aat_hf.tiling.layout import forced_tiles
from aat_hf.tiling.masks import FULL, causal_mask
from aat_hf.tiling.order import closed_tiles, content_order


def clustered(heads: int, clusters: int, size: int, dim: int) -> torch.Tensor:
    """Keys (1, heads, clusters * size, dim) around far centres, in random order."""
    centres = 10 * torch.randn(1, heads, clusters, 1, dim)
    keys = (centres + 0.1 * torch.randn(1, heads, clusters, size, dim)).flatten(2, 3)
    return keys[:, :, torch.randperm(clusters * size)]


def spread(keys: torch.Tensor, tile: int) -> torch.Tensor:
    """Variance inside tiles: (batch, heads)."""
    return keys.unflatten(2, (-1, tile)).var(3, unbiased=False).sum(-1).mean(-1)


def reordered(keys: torch.Tensor, *how: Any) -> torch.Tensor:
    return keys.gather(2, content_order(keys, *how)[..., None].expand_as(keys))


@given(
    length=st.integers(0, 200),
    leaf=st.integers(1, 9),
    halvings=st.integers(0, 4),
    first=st.integers(0, 70),
    dim=st.integers(1, 5),
    kind=st.sampled_from(["normal", "equal", "integers", "huge", "tiny"]),
    axis=st.sampled_from(["principal", "coordinate"]),
)
def test_a_permutation_inside_each_chunk_and_nowhere_else(length, leaf, halvings, first, dim, kind, axis):
    chunk = leaf << halvings
    keys = torch.randn(2, 2, length, dim, generator=torch.Generator().manual_seed(length))
    change = {
        "equal": torch.ones_like,
        "integers": torch.round,
        "huge": lambda x: x * 1e15,
        "tiny": lambda x: x * 1e-15,
    }
    order = content_order(change.get(kind, torch.clone)(keys), chunk, leaf, first, axis)
    place = torch.arange(length).expand(2, 2, length)
    chunk_of = torch.where(place < first, -1, (place - first).div(chunk, rounding_mode="floor"))
    assert torch.equal(order.sort(-1).values, place)
    assert torch.equal(chunk_of.gather(2, order), chunk_of)
    whole = (place >= first) & ((chunk_of + 1) * chunk + first <= length)
    assert torch.equal(order[~whole], place[~whole])
    if kind == "equal":
        assert torch.equal(order, place)


def test_one_dimension_is_sorted_at_the_medians():
    keys = torch.randperm(64).float().view(1, 1, 64, 1)
    leaves = reordered(keys, 64, 4)[0, 0, :, 0].view(16, 4).sort(-1).values
    assert torch.equal(leaves[leaves[:, 0].argsort()], torch.arange(64.0).view(16, 4))


@pytest.mark.parametrize("axis", ["principal", "coordinate"])
def test_clusters_become_tiles(axis):
    keys = clustered(3, 8, 16, 24)
    assert (spread(reordered(keys, 128, 16, 0, axis), 16) < 0.25 * spread(keys, 16)).all()
    assert (spread(reordered(keys, 128, 16), 32) < 0.6 * spread(keys, 32)).all()  # two leaves are a node again


def test_the_widest_coordinate_halves_a_node():
    keys = torch.randn(1, 2, 64, 4) * torch.tensor([[1.0, 1.0, 9.0, 1.0], [5.0, 1.0, 1.0, 2.0]])[:, None]
    halves = reordered(keys, 64, 32, 0, "coordinate").view(2, 2, 32, 4)
    for head, widest in enumerate((2, 0)):
        assert halves[head, 0, :, widest].max() <= halves[head, 1, :, widest].min()


def test_each_head_and_chunk_has_its_own_order():
    keys = clustered(4, 8, 16, 5).view(2, 2, 128, 5)
    whole = content_order(keys, 64, 8)
    for b, h, c in [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]:
        part = content_order(keys[b : b + 1, h : h + 1, 64 * c : 64 * c + 64], 64, 8)
        assert torch.equal(whole[b, h, 64 * c : 64 * c + 64], part[0, 0] + 64 * c)
    assert torch.equal(whole, content_order(keys, 64, 8))
    assert not torch.equal(whole[0, 0], whole[0, 1])


def test_scale_and_place_of_the_keys_do_not_count():
    keys = clustered(2, 4, 16, 8).double()
    order = content_order(keys, 64, 16)
    assert torch.equal(order, content_order(4 * keys, 64, 16))
    assert torch.equal(order, content_order(keys + 7, 64, 16))
    assert torch.equal(order, content_order(keys.roll(3, -1), 64, 16))


def test_equal_keys_keep_the_order_of_the_text():
    pair = torch.tensor([[0.0, 1.0], [3.0, -1.0]])
    keys = pair[torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])].view(1, 1, 8, 2)
    first, second = content_order(keys, 8, 4)[0, 0].view(2, 4).tolist()
    assert {tuple(first), tuple(second)} == {(0, 3, 4, 6), (1, 2, 5, 7)}


def test_gradients_go_through_the_order():
    keys = torch.randn(1, 2, 64, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(1, 2, 64, 4, dtype=torch.float64)
    (reordered(keys, 32, 8) * weight).sum().backward()
    back = content_order(keys, 32, 8).argsort(-1)
    assert torch.equal(keys.grad, weight.gather(2, back[..., None].expand_as(weight)))


def test_closed_chunks_are_seen_whole_and_hold_no_forced_tile():
    config = AATConfig(query_tile=64, key_tile=16, sink_keys=32, local_keys=48, dense_prefix=128)
    mask = causal_mask(640, 640, torch.device("cpu"))
    states = mask.tile_states(64, 16)
    forced = forced_tiles(mask, states, config)
    closed = closed_tiles(states, forced, 16, 128, 32)
    ends = 32 + 128 * torch.arange(1, 5)  # chunks from the sinks on
    starts = 64 * torch.arange(10)
    expected = (ends <= starts[:, None] - 48) & (starts[:, None] + 64 > 128)
    assert torch.equal(closed[0, 0, :, 2:34].view(10, 4, 8), expected[..., None].expand(10, 4, 8))
    assert not closed[..., :2].any() and not closed[..., 34:].any()
    assert not (closed & (forced | (states != FULL))).any() and closed.any()


@pytest.mark.parametrize("chunk,leaf", [(96, 32), (16, 32), (64, 0), (0, 0)])
def test_chunks_that_cannot_be_halved_are_refused(chunk, leaf):
    with pytest.raises(ValueError, match=f"chunk = {chunk}"):
        content_order(torch.zeros(1, 1, 128, 2), chunk, leaf)


def test_a_start_before_the_keys_and_tiles_across_chunks_are_refused():
    with pytest.raises(ValueError, match="first = -1"):
        content_order(torch.zeros(1, 1, 128, 2), 64, 16, -1)
    with pytest.raises(ValueError, match="axis = 'x'"):
        content_order(torch.zeros(1, 1, 128, 2), 64, 16, 0, "x")
    states = torch.full((1, 1, 2, 8), FULL)
    with pytest.raises(ValueError, match="key_tile = 16"):
        closed_tiles(states, states != FULL, 16, 64, 24)
