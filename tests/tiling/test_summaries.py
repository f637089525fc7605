"""Tile summaries of growing keys: those of a recomputation, and of one tensor only."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.tiling import summaries as module
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.summaries import TileSummaries, summaries_of


def check(summaries, k, key_tile):
    means, variances, count = summaries.of(k, key_tile)
    assert count == k.shape[2] // key_tile
    assert means.shape[:2] == variances.shape[:2] == k.shape[:2] and means.shape[3] == k.shape[3]
    wanted = summarise(k[:, :, : count * key_tile], key_tile, 1)
    np.testing.assert_allclose(means[:, :, :count], wanted.mean[:, :, :, 0], atol=1e-6)
    np.testing.assert_allclose(variances[:, :, :count], wanted.variance[:, :, :, 0], atol=1e-6)


@given(st.lists(st.integers(0, 130), min_size=1, max_size=5), st.sampled_from([16, 48]), st.sampled_from([1, 5, 80]))
def test_growing_and_cropped_keys(lengths, key_tile, dim):
    """Keys that grow to a length, are cropped by a third, and grow again to the next with other values."""
    found, k = TileSummaries(), torch.randn(2, 3, 0, dim)
    for length in lengths:
        k = torch.cat([k, torch.randn(2, 3, max(0, length - k.shape[2]), dim)], 2)
        check(found, k, key_tile)
        k = k[:, :, : k.shape[2] * 2 // 3]
        found.crop(k.shape[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_new_tiles_are_read(dtype):
    k = torch.randn(1, 2, 123, 5).to(dtype)
    found = TileSummaries()
    check(found, k, 16)
    wanted = torch.cat([k, torch.randn(1, 2, 40, 5).to(dtype)], 2)
    broken = wanted.clone()
    broken[:, :, :112] = float("nan")  # tiles that are known
    means, variances, count = found.of(broken, 16)
    fresh = TileSummaries().of(wanted, 16)
    assert count == fresh[2] == 10
    assert (means[:, :, :10] == fresh[0][:, :, :10]).all() and (variances[:, :, :10] == fresh[1][:, :, :10]).all()


def test_another_tile_size_begins_anew():
    k, found = torch.randn(1, 2, 123, 5), TileSummaries()
    for key_tile in (16, 32, 16):
        check(found, k, key_tile)


def test_select():
    k, found = torch.randn(3, 2, 40, 5), TileSummaries()
    found.select(torch.tensor([1, 0]))  # before anything is known
    check(found, k, 16)
    for index in (torch.tensor([2, 2, 0, 1]), torch.tensor([3, 0])):
        k = k[index]
        found.select(index)
        check(found, k, 16)
        k = torch.cat([k, torch.randn(len(k), 2, 40, 5)], 2)
        check(found, k, 16)


def test_only_the_tensor_last_noted_has_them():
    a, b, found = torch.randn(1, 1, 20, 4), torch.randn(1, 1, 20, 4), TileSummaries()
    assert summaries_of(a) is None
    found.note(a)
    assert summaries_of(a) is found and summaries_of(b) is None and summaries_of(a.view_as(a)) is None
    found.note(b)
    assert summaries_of(a) is None and summaries_of(b) is found
    b.add_(1)
    assert summaries_of(b) is None
    found.note(b)
    assert summaries_of(b) is found
    b.data = b.data.clone()  # other memory
    assert summaries_of(b) is None


def test_tensors_of_inference_mode_have_none():
    """They do not count changes."""
    found = TileSummaries()
    with torch.inference_mode():
        k = torch.randn(1, 1, 20, 4)
        found.note(k)
        assert summaries_of(k) is None


def test_nothing_is_left_behind():
    before, found = len(module._known), TileSummaries()
    for _ in range(20):
        found.note(torch.randn(1, 1, 20, 4))
    assert len(module._known) == before + 1
    del found
    gc.collect()
    assert len(module._known) == before
