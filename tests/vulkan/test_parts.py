"""Long calls are computed in parts, one of which is copied while another is computed: the same bits."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CPU, MASKS, inputs, random_map
from parity import check, masks

from aat_hf.kernels import vulkan as kernel
from aat_hf.kernels.vulkan import vulkan_attention, vulkan_skip_attention
from aat_hf.tiling.masks import causal_mask
from aat_hf.vulkan import attention, workspace
from aat_hf.vulkan.errors import OutOfDeviceMemoryError
from aat_hf.vulkan.workspace import pool_of

pytestmark = pytest.mark.vulkan


@pytest.fixture(autouse=True)
def on_provider(provider, monkeypatch):
    """Everything is long, also for a binding that can only wait."""
    monkeypatch.setattr(kernel, "get_provider", lambda: provider)
    monkeypatch.setattr(provider, "overlaps", True, raising=False)
    monkeypatch.setattr(attention, "_PART_PRODUCTS", 1)
    monkeypatch.setattr(workspace, "_LONG", 0)


@pytest.fixture
def started(provider, monkeypatch):
    """What was started and not waited for, at most and now."""
    counts = [0, 0]
    start = provider.start

    def counted(*args, **options):
        counts[1] += 1
        counts[0] = max(counts)
        wait = start(*args, **options)

        def finish():
            counts[1] -= 1
            wait()

        return finish

    monkeypatch.setattr(provider, "start", counted)
    return counts


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "parts"), [(1, 6, 3, 3), (2, 4, 2, 2), (1, 5, 5, 4), (1, 2, 1, 1)]
)
def test_parts_are_the_whole(name, batch, heads, kv_heads, parts, started, monkeypatch):
    mask = masks(batch, heads, 70, 70)[name]
    tensors, tile_map = inputs(batch, heads, kv_heads, 70, 70, 16), random_map(mask, batch, heads, 32, 16, 0.6)
    found = vulkan_attention(*tensors, tile_map, mask, 0.3)
    assert started == [parts, 0]
    monkeypatch.setattr(attention, "_PARTS", 1)
    for one, other in zip(found, vulkan_attention(*tensors, tile_map, mask, 0.3), strict=True):
        assert torch.equal(one, other)


def test_parts_have_gradients():
    mask = causal_mask(70, 70, CPU)
    check(inputs(1, 4, 2, 70, 70, 16), random_map(mask, 1, 4, 32, 32, 0.6), mask)


def test_the_skip_rule_is_computed_whole(started):
    mask = causal_mask(70, 70, CPU)
    vulkan_skip_attention(*inputs(1, 4, 2, 70, 70, 16), random_map(mask, 1, 4, 32, 32), mask, 0.3, None, -5.0)
    assert started[0] == 1


def test_an_error_in_a_later_part_leaves_nothing_in_flight(provider, started, monkeypatch, caplog):
    mask = causal_mask(70, 70, CPU)
    tensors, tile_map = inputs(1, 4, 2, 70, 70, 16), random_map(mask, 1, 4, 32, 32)
    wanted, in_use = vulkan_attention(*tensors, tile_map, mask, 0.3)[0], pool_of(provider).statistics.in_use
    prepare, calls = attention.forward_dispatch, []

    def fails(work, *args):
        calls.append(1)
        if len(calls) == 2:
            work.buffers(torch.ones(1000))  # on its way
            raise OutOfDeviceMemoryError("full")
        return prepare(work, *args)

    monkeypatch.setattr(attention, "forward_dispatch", fails)
    kernel._told.clear()
    output = vulkan_attention(*tensors, tile_map, mask, 0.3)[0]  # on the CPU
    assert len(calls) == 2 and started[1] == 0 and "full" in caplog.text
    assert torch.allclose(output, wanted, atol=1e-5)
    assert pool_of(provider).statistics.in_use == in_use
    calls += [1]
    assert torch.equal(vulkan_attention(*tensors, tile_map, mask, 0.3)[0], wanted)
