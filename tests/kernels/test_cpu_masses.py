"""Compiled passes of a selection against the same in plain PyTorch: moments, what is left out, compressed maps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from aat_hf.kernels.cpu_matrices import entry, pack, unpack
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd import take_number
from aat_hf.kernels.simd_emit import PANEL
from aat_hf.kernels.simd_rough import relative_rough
from aat_hf.tiling.masks import FULL, NONE, IntervalMask, causal_mask
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.select import mean_left_out
from aat_hf.tiling.tile_map import TileMap, _compressed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "dim", "groups"), [(1, 1, 1), (16, 5, 2), (333, 64, 2), (1030, 33, 4), (95, 128, 16)])
def test_moments_are_those_of_float64(dtype, keys, dim, groups):
    k = (3 + torch.randn(2, 3, keys, dim)).to(dtype)
    found, wanted = summarise(k, 16, groups), summarise(k.double(), 16, groups)
    assert torch.equal(found.count, wanted.count) and found.mean.dtype == torch.float32
    assert torch.allclose(found.mean.double(), wanted.mean, atol=3e-6)
    assert torch.allclose(found.variance.double(), wanted.variance, atol=2e-5)
    assert not found.mean[:, :, found.count == 0].any()


@st.composite
def maps(draw):
    """Levels of a dense map, and the states of all heads or of each."""
    shape = (*draw(array_shapes(min_dims=3, max_dims=3, max_side=3)), draw(st.integers(1, 40)))
    own = (*(draw(st.sampled_from([1, size])) for size in shape[:2]), *shape[2:])
    levels = draw(arrays("uint8", shape, elements=st.integers(0, 2)))
    return torch.from_numpy(levels), torch.from_numpy(draw(arrays("uint8", own, elements=st.integers(NONE, FULL))))


@given(maps())
@settings(max_examples=200, deadline=None)
def test_both_ways_compress_to_the_same_map(arguments):
    found = TileMap.from_dense(*arguments, 64, 16)
    for a, b in zip((found.row_start, found.columns, found.levels, found.cut), _compressed(*arguments), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("tiles", [1, 3, 16, 33, 200])
def test_what_is_left_out_is_that_of_torch(tiles):
    mass, kept = torch.rand(2, 3, 11, tiles), torch.rand(2, 3, 5, tiles) < 0.5
    rows = torch.randint(0, 5, (11,))
    wanted = mass.double().masked_fill(kept[:, :, rows], 0).sum(-1).mean(-1)
    assert torch.allclose(mean_left_out(mass, kept, rows).double(), wanted, rtol=1e-5)
    wanted = mass[:, :, :5].double().masked_fill(kept, 0).sum(-1).mean(-1)
    assert torch.allclose(mean_left_out(mass[:, :, :5], kept).double(), wanted, rtol=1e-5)


@entry
def there_and_back(counter, rows, factor, factors, panel, out):
    pack(rows, 1, factor, panel)
    unpack(panel, rows.shape[1], factors, out)


@pytest.mark.parametrize("dim", [1, 5, 16, 50, 64])
@pytest.mark.parametrize("count", [2, PANEL, PANEL + 1, 3 * PANEL])
def test_panels_are_rows_transposed(count, dim):
    rows, factors = np.random.rand(count, dim).astype(np.float32), np.random.rand(PANEL).astype(np.float32)
    panel, out = np.empty(dim * PANEL, np.float32), np.empty(PANEL * dim, np.float32)
    run(there_and_back, 1, rows, np.float32(2), factors, panel, out)
    wanted = 2 * rows[np.minimum(np.arange(1, PANEL + 1), count - 1)]
    assert np.array_equal(panel.reshape(dim, PANEL), wanted.T)
    assert np.array_equal(out.reshape(PANEL, dim), wanted * factors[:, None])


@entry
def powers(counter, values, top, total):
    if take_number(counter.ctypes.data):
        return  # not when it is compiled
    relative_rough(values.ctypes.data, values.size // PANEL, top.ctypes.data, total.ctypes.data)


def test_rough_powers_are_within_four_percent_and_right_on_average():
    exponents = np.linspace(-120, 0, 4096 * PANEL, dtype=np.float32)
    values, total = exponents.copy(), np.zeros(PANEL, np.float32)
    run(powers, 1, values, np.zeros(PANEL, np.float32), total)
    error = values / np.exp2(exponents.astype(np.float64)) - 1
    assert -0.04 < error.min() < -0.03 and 0.015 < error.max() < 0.025 and abs(error.mean()) < 1e-3
    assert np.allclose(total, values.reshape(-1, PANEL).sum(0), rtol=1e-4)
    values = np.full(PANEL, -130, np.float32)
    run(powers, 1, values, np.zeros(PANEL, np.float32), total)
    assert not values.any()


def test_a_mask_is_asked_once(monkeypatch):
    mask, asked = causal_mask(300, 300, torch.device("cpu")), []
    states = IntervalMask._tile_states
    monkeypatch.setattr(IntervalMask, "_tile_states", lambda *a: asked.append(a[1:]) or states(*a))
    with torch.inference_mode():
        first = mask.tile_states(64, 16)
    assert mask.tile_states(64, 16) is first and not first.is_inference()
    assert mask.tile_states(64, 32).shape[-1] == math.ceil(300 / 32)
    assert asked == [(64, 16), (64, 32)]
