"""Every shader against float64 or the CPU's own steps, on every provider, bit for bit the same twice."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from aat_hf.tiling import measure, moments, select
from aat_hf.tiling.masks import NONE, FunctionMask, IntervalMask, TensorMask, causal_mask, full_mask
from aat_hf.vulkan import build_shaders, ops, shapes
from aat_hf.vulkan.interface import SHADERS

CPU = torch.device("cpu")
LIMIT = 2e-6
vulkan = pytest.mark.vulkan


def distance(found, expected):
    """Largest error relative to the largest value."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def same_twice(compute):
    """A result whose bits do not change from run to run."""
    first, second = compute(), compute()
    assert torch.equal(first, second)
    return first


def test_binaries_belong_to_their_sources():
    known = json.loads((SHADERS / build_shaders.MANIFEST).read_text("utf-8"))
    found = build_shaders.manifest(known["compiler"])
    assert found == known, "sources or binaries changed: run `make shaders`"
    assert len(found["shaders"]) >= 9


@pytest.mark.skipif(shutil.which("glslc") is None, reason="needs glslc")
@pytest.mark.parametrize("source", build_shaders.sources(), ids=lambda path: path.stem)
def test_sources_compile_to_the_binaries(source, tmp_path):
    binary = tmp_path / "shader.spv"
    build_shaders.compile_shader(source, binary)
    known = json.loads((SHADERS / build_shaders.MANIFEST).read_text("utf-8"))
    if build_shaders.compiler() == known["compiler"]:  # another version need not give the same bytes
        assert binary.read_bytes() == source.with_suffix(".spv").read_bytes()


@vulkan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("keys", "key_tile", "groups", "dim"), [(150, 64, 4, 24), (33, 32, 1, 3), (64, 16, 16, 64)])
def test_tile_moments(provider, dtype, keys, key_tile, groups, dim):
    k = (torch.randn(2, 3, keys, dim) + 5).to(dtype)
    found = ops.tile_moments(provider, k, key_tile, groups)
    expected = moments.summarise(k.double(), key_tile, groups)
    assert torch.equal(found.count, expected.count)
    assert distance(found.mean, expected.mean) < LIMIT
    assert distance(found.variance, expected.variance) < LIMIT
    assert torch.equal(found.variance, ops.tile_moments(provider, k, key_tile, groups).variance)


def row_masks(batch, heads, queries, keys):
    ramp = torch.arange(queries)[None] + keys - queries
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[-1, : keys // 3] = False
    table = torch.rand(batch, heads, queries, keys) < 0.3
    table[:, :, 5] = False
    return {
        "full": full_mask(queries, keys, CPU),
        "causal": causal_mask(queries, keys, CPU),
        "window": IntervalMask((ramp - 20).clamp(min=0), ramp + 1, keys),
        "padding": causal_mask(queries, keys, CPU, key_valid=valid),
        "per head": FunctionMask(lambda b, h, i, j: table[b, h, i, j], batch, queries, keys, CPU, heads),
        "tensor": TensorMask(table[:1, :1]),
    }


@vulkan
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", sorted(row_masks(1, 1, 8, 8)))
def test_measured_rows(provider, name, softcap):
    q, k, rows = torch.randn(2, 4, 70, 20), torch.randn(2, 2, 90, 20), torch.tensor([0, 5, 6, 33, 69])
    mask = row_masks(2, 4, 70, 90)[name]
    found = ops.measure_rows(provider, q, k, mask, rows, 40, 0.5, softcap)
    expected = measure.measure_rows(q.double(), k.double(), mask, rows, 40, 0.5, softcap)
    finite = expected.lse.isfinite()
    assert torch.equal(finite, found.lse.isfinite())
    assert distance(found.probability, expected.probability) < LIMIT
    assert distance(found.lse[finite], expected.lse[finite]) < LIMIT
    again = ops.measure_rows(provider, q, k, mask, rows, 40, 0.5, softcap)
    assert torch.equal(found.probability, again.probability)


@vulkan
@pytest.mark.parametrize("max_kept", [1.0, 0.5])
@pytest.mark.parametrize("free", [False, True])
def test_selection(provider, max_kept, free):
    mass = torch.rand(2, 3, 9, 37).pow(6)
    mass = mass / mass.sum(-1, keepdim=True)
    mass[0, 0, 0, :4] = mass[0, 0, 0, 4:8]  # of equal tiles all or none
    mass[0, 0, 1, 3] = float("nan")  # counts as kept
    states = torch.randint(NONE, 3, (2, 1, 9, 37), dtype=torch.uint8)
    forced = torch.rand(1, 1, 9, 37) < 0.1
    tolerance = torch.tensor([[0.02, 0.1, 0.3], [0.5, 0.05, 0.0]])
    free_mass = 0.1 * torch.rand(2, 3, 9) if free else None
    arguments = mass, forced, states, tolerance, max_kept, free_mass
    found = same_twice(lambda: ops.select_tiles(provider, *arguments))
    assert torch.equal(found, select.select_tiles(*arguments))


@vulkan
def test_shapes_that_do_not_fit_are_not_offered(provider):
    for role in ("forward", "queries", "keys"):
        for width in (1, 8, 10, 16, 32, 64):
            for shape in shapes.candidates(provider.device, role, width, width):
                assert shape.shared_bytes <= provider.device.max_shared_bytes
                assert shape.threads % shapes.LANES == 0 and shape.threads <= provider.device.max_invocations
