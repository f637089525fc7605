"""Rows rounded to 8 bits, and masses of tiles from them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import peaked
from test_cpu_processes import AVX2, SSE, X86

from aat_hf.attention import tiled_attention
from aat_hf.config import AATConfig
from aat_hf.kernels import cpu, cpu_rows
from aat_hf.kernels.cpu_bytes import byte_rows, score_error
from aat_hf.kernels.cpu_row_data import Rows
from aat_hf.kernels.cpu_rows import measure_rows
from aat_hf.kernels.simd_emit import LANES
from aat_hf.tiling.layout import sampled_rows
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.measure import RoughKeys
from aat_hf.tiling.moments import Moments, summarise
from aat_hf.tiling.predict import predict_query_tiles

DEVICE = torch.device("cpu")


def rounded(x):
    """Each row as a whole number of 127ths of its own largest value, in float64."""
    step = x.double().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x.double() / step).round() * step


@pytest.fixture
def rough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor that multiplies bytes faster; others compute the same in more steps."""
    monkeypatch.setattr(cpu_rows, "BYTES", True)


@pytest.fixture
def exact_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exponentials of estimates as exact as others, so that only roundings are left."""
    monkeypatch.setattr(cpu_rows, "Rows", lambda *fields: Rows(*fields[:-1], False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 5, 64, 123])
def test_rows_are_rounded_to_steps_of_their_own_largest_number(dtype, dim):
    x = (torch.randn(600, dim) * torch.logspace(-3, 3, 600)[:, None]).to(dtype)
    x[7] = 0
    found = byte_rows(cpu.as_matrix(x))
    assert found.bytes.shape == (600, -(-dim // LANES) * LANES) and (found.bytes[:, dim:] == 128).all()
    back = torch.from_numpy((found.bytes[:, :dim].astype(np.float64) - 128) * found.scale[:, None])
    step = x.double().abs().amax(-1, keepdim=True) / 127
    assert bool(((back - x.double()).abs() <= 0.5001 * step).all())
    assert bool((back[7] == 0).all())


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dim", [5, 24, 123])
def test_rough_masses_are_those_of_rounded_queries_and_keys(rough, exact_powers, softcap, dim):
    mask = causal_mask(230, 333, DEVICE)
    q, k, _ = peaked(2, 6, 3, 230, 333, dim)
    rows = torch.tensor([0, 1, 3, 17, 50, 51, 100, 160, 200, 229])
    found = measure_rows(q, k, mask, rows, 16, 0.3, softcap, rough=RoughKeys(q, k, 0.3))
    wanted = measure_rows(rounded(q).float(), rounded(k).float(), mask, rows, 16, 0.3, softcap)
    assert torch.allclose(found[0], wanted[0], atol=1e-3) and torch.allclose(found[1], wanted[1], atol=2e-3)
    exact = measure_rows(q, k, mask, rows, 16, 0.3, softcap)
    assert not torch.equal(found[0], exact[0])
    assert float((found[0] - exact[0]).abs().sum(-1).mean()) / 2 < 0.02  # total variation


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dim", [5, 64])
@pytest.mark.parametrize("in_bytes", [False, True])
def test_rough_exponentials_change_masses_by_a_tenth_at_most(monkeypatch, in_bytes, dim, softcap):
    """A mass takes two of them, each 4 % too small to 2 % too large."""
    monkeypatch.setattr(cpu_rows, "BYTES", in_bytes)
    mask, rows = causal_mask(230, 333, DEVICE), torch.arange(0, 230, 7)
    q, k, _ = peaked(2, 6, 3, 230, 333, dim)
    found = measure_rows(q, k, mask, rows, 16, 0.3, softcap, rough=RoughKeys(q, k, 0.3))
    monkeypatch.setattr(cpu_rows, "Rows", lambda *fields: Rows(*fields[:-1], False))
    wanted = measure_rows(q, k, mask, rows, 16, 0.3, softcap, rough=RoughKeys(q, k, 0.3))
    assert not torch.equal(found[0], wanted[0])
    assert torch.allclose(found[0], wanted[0], rtol=0.1, atol=1e-6)
    assert bool(((found[1] - wanted[1]) > -0.085).all()) and bool(((found[1] - wanted[1]) < 0.045).all())
    assert torch.allclose(found[0].sum(-1), torch.ones(()), atol=1e-5)


def test_rough_predictions_are_those_of_rounded_moments(rough, exact_powers):
    mask, config = causal_mask(512, 512, DEVICE), AATConfig(key_tile=16, local_keys=16, sink_keys=16)
    q, k, _ = peaked(1, 4, 2, 512, 512, 24)
    exact = summarise(k, 16, 1)
    found = predict_query_tiles(q, k, mask, exact, config, 0.2, rough=RoughKeys(q, k, 0.2))
    near, far = rounded(k).float(), Moments(exact.count, *(rounded(x).float() for x in (exact.mean, exact.variance)))
    wanted = predict_query_tiles(rounded(q).float(), near, mask, far, config, 0.2)
    assert not torch.equal(found, predict_query_tiles(q, k, mask, exact, config, 0.2))
    assert torch.allclose(found, wanted, atol=3e-3)
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)


def shifted(q, k, by):
    """Keys of the last kv head with one channel far from 0, as biases make them; the softmax hardly changes."""
    q, k = q.clone(), k.clone()
    q[..., 3] *= 1e-2
    k[:, -1, :, 3] += by
    return q, k


@pytest.mark.parametrize("by", [0, 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_error_of_a_rounded_score_is_known(by, dtype):
    q, k = shifted(torch.randn(2, 4, 300, 64), torch.randn(2, 2, 500, 64), by)
    q, k = q.to(dtype), k.to(dtype)
    expected = score_error(q, k, byte_rows(cpu.as_matrix(k)), 0.3)
    wide = k.double().repeat_interleave(2, 1)
    error = 0.3 * (rounded(q) @ rounded(k).repeat_interleave(2, 1).mT - q.double() @ wide.mT)
    assert expected == pytest.approx(float(error.std((-1, -2)).max()), rel=0.15)


def test_keys_that_8_bits_cannot_hold_are_not_rounded(rough, exact_powers):
    """One head of one call is enough: the tiles of all its heads are estimated without."""
    q, k, v = peaked(1, 4, 2, 1024, 1024, 64)
    q, k = shifted(q, k, 300)
    mask, rows = causal_mask(1024, 1024, DEVICE), torch.arange(0, 1024, 16)
    keys = RoughKeys(q, k, 0.5)
    assert keys.rounded is None and RoughKeys(q[:, :2], k[:, :1], 0.5).rounded is not None
    found, wanted = (measure_rows(q, k, mask, rows, 16, 0.5, rough=x) for x in (keys, None))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    config = AATConfig(min_length=0, dense_prefix=0, max_kept=1.0, backend="cpu")
    result = tiled_attention(q, k, v, config=config, is_causal=True, scale=0.5)
    assert float(result.tile_map.density.mean()) < 0.9
    assert bool((result.audit.mean < 1.5 * config.tolerance).all())


def test_only_rough_calls_are_rounded(rough):
    """The rows of an audit are exact on every processor."""
    mask, rows = causal_mask(200, 200, DEVICE), sampled_rows(200, 64, 16, DEVICE).flatten()
    q, k, _ = peaked(1, 2, 1, 200, 200, 20)
    scores = (q[:, :, rows].double() @ k.double().mT * 0.3).masked_fill(~mask.rows(rows), float("-inf"))
    wanted = scores.softmax(-1)
    found = measure_rows(q, k, mask, rows, 16, 0.3)[0]
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(found[..., 0].double(), wanted[..., :16].sum(-1), atol=2e-6)


SCRIPT = """
import torch
from aat_hf.kernels import cpu_rows, simd_bytes
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.measure import RoughKeys
torch.manual_seed(0)
q, k = torch.randn(1, 2, 150, 20), torch.randn(1, 1, 150, 20)
mask, rows = causal_mask(150, 150, q.device), torch.arange(0, 150, 7)
print(simd_bytes.BYTES)
for forced in (simd_bytes.BYTES, True):
    cpu_rows.BYTES = forced
    rough = RoughKeys(q, k, 0.5)
    print(cpu_rows.measure_rows(q, k, mask, rows, 16, 0.5, rough=rough)[0].double().square().sum().item())
print(cpu_rows.measure_rows(q, k, mask, rows, 16, 0.5)[0].double().square().sum().item())
"""


@pytest.mark.skipif(not X86, reason="forces x86 features")
@pytest.mark.parametrize("features", [SSE, AVX2])
def test_processors_without_byte_products_round_nothing(features, tmp_path):
    environment = {"PYTHONPATH": str(Path(cpu.__file__).parents[2]), "NUMBA_CACHE_DIR": str(tmp_path), **features}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    fast, default, forced, exact = done.stdout.split()
    assert fast == "False" and len({default, forced, exact}) == 3  # by default exponentials alone are rough
    assert float(default) == pytest.approx(float(exact), rel=1e-2)
    assert float(forced) == pytest.approx(float(exact), rel=2e-2)
