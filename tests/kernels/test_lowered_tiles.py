"""What the kernels find out about the mask in cut tiles is kept for the next layer, and only for the same tiles."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernel_cases import CPU, inputs, random_map

from aat_hf.kernels import lowered_tiles
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.lowered_tiles import lower_tiles
from aat_hf.tiling.masks import FunctionMask, IntervalMask, TensorMask, causal_mask
from aat_hf.tiling.tile_map import EXACT, TileMap


class Counted(FunctionMask):
    """A band, and how often it was asked."""

    def __init__(self, queries: int = 200) -> None:
        super().__init__(lambda b, h, q, k: (k <= q) & (k > q - 50), 1, queries, queries, CPU)
        self.asked = 0

    def allowed(self, *index):
        self.asked += 1
        return super().allowed(*index)


def uncached(tile_map, mask):
    lowered_tiles._cut_tiles.pop(mask, None)
    return lower_tiles(tile_map, mask)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_tiles_are_asked_about_once():
    mask = Counted()
    tile_map = random_map(mask, 1, 2, 32, 16, 0.5)
    first, asked = lower_tiles(tile_map, mask), mask.asked
    again = lower_tiles(tile_map, mask)
    assert asked == mask.asked > 0
    assert same(first, again) and again.masks.data_ptr() == first.masks.data_ptr()


@pytest.mark.parametrize("kind", ["function", "interval", "tensor"])
def test_other_tiles_of_the_same_mask_are_not_taken_for_them(kind):
    """Maps of the same and of other tile sizes in turn: each as if nothing were kept."""
    masks = {"function": Counted(), "interval": causal_mask(200, 200, CPU), "tensor": TensorMask(
        torch.rand(1, 2, 200, 200, generator=torch.Generator().manual_seed(0)) < 0.7)}  # fmt: skip
    mask = masks[kind]
    dense = TileMap.dense(mask, 2, 2, 32, 16)
    kept = torch.ones(2, 2, *dense.shape[2:], dtype=torch.uint8) * EXACT
    kept[:, 1, ::2] = 0
    maps = [dense, TileMap.from_dense(kept, dense.states, 32, 16), TileMap.dense(mask, 2, 2, 16, 32),
            TileMap.dense(mask, 1, 1, 32, 16) if kind != "tensor" else TileMap.dense(mask, 1, 2, 32, 16)]  # fmt: skip
    wanted = [uncached(tile_map, mask) for tile_map in maps]
    for _ in range(2):
        for tile_map, expected in zip(maps, wanted, strict=True):
            assert same(lower_tiles(tile_map, mask), expected)


def test_another_mask_of_the_same_shape_has_its_own():
    ramp = torch.arange(1, 201)[None]
    masks = [IntervalMask(torch.zeros_like(ramp), last, 200) for last in (ramp, (ramp - 5).clamp(min=0))]
    maps = [TileMap.dense(mask, 1, 1, 32, 16) for mask in masks]
    found = [lower_tiles(tile_map, mask) for tile_map, mask in zip(maps, masks, strict=True)]
    assert not torch.equal(found[0].masks, found[1].masks)
    assert all(same(x, uncached(m, mask)) for x, m, mask in zip(found, maps, masks, strict=True))


def test_nothing_is_kept_longer_than_its_mask():
    mask = Counted()
    lower_tiles(TileMap.dense(mask, 1, 1, 32, 16), mask)
    assert mask in lowered_tiles._cut_tiles
    alive = weakref.ref(mask)
    del mask
    gc.collect()
    assert alive() is None


def test_many_masks_are_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lowered_tiles, "_KEPT_BYTES", 0)
    mask = Counted()
    lower_tiles(TileMap.dense(mask, 1, 1, 32, 16), mask)
    assert not lowered_tiles._cut_tiles[mask]


def test_what_was_found_in_inference_mode_serves_training():
    mask = causal_mask(70, 70, CPU)
    tile_map = TileMap.dense(mask, 1, 2, 32, 16)
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 70, 70, 8))
    with torch.inference_mode():
        cpu_attention(q, k, v, tile_map, mask, 0.3)
    cpu_attention(q, k, v, tile_map, mask, 0.3)[0].sum().backward()
    assert q.grad is not None


def test_threads_that_lower_other_maps_of_one_mask():
    mask = Counted()
    maps = [random_map(mask, 1, 2, 32, 16, density) for density in (0.3, 0.5, 0.8, 1.0)]
    wanted = [uncached(tile_map, mask) for tile_map in maps]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tile_map: lower_tiles(tile_map, mask), maps * 20))
    assert all(same(x, wanted[i % 4]) for i, x in enumerate(found))
