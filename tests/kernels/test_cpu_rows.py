"""The compiled measurement of rows against the same in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from inputs import peaked

from aat_hf.config import AATConfig
from aat_hf.kernels.cpu_rows import measure_rows
from aat_hf.tiling.layout import diagonal_tiles, sampled_rows
from aat_hf.tiling.masks import IntervalMask, causal_mask, full_mask
from aat_hf.tiling.measure import _tile_log_mass, normalised
from aat_hf.tiling.moments import summarise
from aat_hf.tiling.predict import _predicted_log_mass, predict_rows

QUERIES, KEYS = 230, 333
DEVICE = torch.device("cpu")


def window(reach: int) -> IntervalMask:
    last = torch.arange(QUERIES)[None] + 1 + KEYS - QUERIES
    return IntervalMask(last - reach, last, KEYS)


def holes(batch: int) -> torch.Tensor:
    valid = torch.rand(batch, KEYS) > 0.3
    valid[:, :70] = False
    return valid


MASKS = {
    "causal": lambda: causal_mask(QUERIES, KEYS, DEVICE),
    "full": lambda: full_mask(QUERIES, KEYS, DEVICE),
    "window": lambda: window(90),
    "holes": lambda: causal_mask(QUERIES, KEYS, DEVICE, key_valid=holes(2)),
    "empty rows": lambda: causal_mask(QUERIES, KEYS, DEVICE, offset=-20),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exact_rows_equal_float64(mask, softcap, dtype):
    mask = MASKS[mask]()
    q, k, _ = peaked(2, 6, 3, QUERIES, KEYS, 24, dtype=dtype)
    rows = torch.tensor([0, 1, 3, 17, 50, 51, 100, 160, 200, 229])
    for key_tile in (16, 64, 128):
        probability, lse = measure_rows(q, k, mask, rows, key_tile, 0.3, softcap)
        exact = normalised(_tile_log_mass(q.double(), k.double(), mask, rows, key_tile, 0.3, softcap), None)
        assert torch.allclose(probability.double(), exact.probability, atol=2e-6)
        assert torch.allclose(lse.double(), exact.lse, atol=1e-4)
        assert torch.equal(lse == float("-inf"), exact.lse == float("-inf"))


@pytest.mark.parametrize("mask", ["causal", "full", "window", "holes"])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_predicted_rows_equal_the_formula(mask, softcap):
    """Tiles in no row's local band are predicted by the same formula as in PyTorch; the sink is exact."""
    mask = MASKS[mask]()
    q, k, _ = peaked(2, 4, 2, QUERIES, KEYS, 24)
    config = AATConfig(query_tile=32, key_tile=32, summary_keys=8, predict_stride=8, local_keys=32, sink_keys=32)
    moments = summarise(k, 32, 4)
    rows = sampled_rows(QUERIES, 32, 8, DEVICE).flatten()
    far = torch.full((1, QUERIES), -100)
    probability, lse = measure_rows(q, k, mask, rows, 32, 0.3, softcap, moments, far, 1, 1)
    predicted = _predicted_log_mass(q, k, mask, moments, config, 0.3, softcap)
    exact = _tile_log_mass(q, k, mask, rows, 32, 0.3, softcap)
    low, high = diagonal_tiles(mask, 32, 32)
    found = probability.log() + lse[..., None]
    for row in range(len(rows)):
        band = range(int(low[0, rows[row] // 32]) - 1, int(high[0, rows[row] // 32]) + 2)
        for tile in range(found.shape[-1]):
            if tile in band and tile != 0:
                continue  # exact in `predicted`, predicted here
            wanted = exact if tile == 0 else predicted
            assert torch.allclose(found[:, :, row, tile], wanted[:, :, row, tile], atol=2e-4)


def test_the_local_band_is_exact():
    mask, config = causal_mask(512, 512, DEVICE), AATConfig(key_tile=64, local_keys=128, predict_stride=8)
    q, k, _ = peaked(1, 2, 1, 512, 512, 16)
    rows = sampled_rows(512, 64, 8, DEVICE).flatten()
    found = predict_rows(q, k, mask, summarise(k, 64, 4), config, 0.25)
    exact = _tile_log_mass(q, k, mask, rows, 64, 0.25, None)
    masses = found.probability.log() + found.lse[..., None]
    for row, place in enumerate(rows // 64):
        band = [0, *range(max(0, int(place) - 2), int(place) + 1)]
        assert torch.allclose(masses[:, :, row, band], exact[:, :, row, band], atol=1e-4)


def test_sinks_take_their_share():
    mask = causal_mask(300, 300, DEVICE)
    q, k, _ = peaked(1, 2, 1, 300, 300, 16)
    config, sinks = AATConfig(key_tile=64, predict_stride=8), torch.tensor([0.5, 3.0])
    plain = predict_rows(q, k, mask, summarise(k, 64, 4), config, 0.25)
    with_sinks = predict_rows(q, k, mask, summarise(k, 64, 4), config, 0.25, None, sinks)
    lost = 1 - with_sinks.probability.sum(-1)
    assert torch.allclose(lost, torch.exp(sinks[None, :, None] - with_sinks.lse), atol=1e-5)
    assert bool((with_sinks.lse > plain.lse).all())
