"""Where the device is used, and with which workgroups: decided by what was measured on it."""

from __future__ import annotations

import dataclasses
import logging
from itertools import count

import numpy as np
import pytest
import torch
from fake import DEVICE, FakeProvider

from aat_hf.attention import tiled_attention
from aat_hf.kernels import vulkan as kernel
from aat_hf.tiling.masks import full_mask
from aat_hf.tiling.tile_map import EXACT, TileMap
from aat_hf.vulkan import calibrate, plain, profile
from aat_hf.vulkan import provider as providers
from aat_hf.vulkan.errors import VulkanLimitError, VulkanUnavailableError
from aat_hf.vulkan.profile import Costs, Direction, Profile
from aat_hf.vulkan.shapes import Shape, candidates
from aat_hf.vulkan.workspace import Workspace

GPU = dataclasses.replace(DEVICE, kind="discrete", name="A (fast) GPU", max_shared_bytes=49152)
FASTER, SLOWER = Direction(1e-9, 0.0, 0.0, 1.0), Direction(1e9, 0.0, 0.0, 1.0)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Store a profile of a device that is the one in use."""
    monkeypatch.setattr(profile, "cache_dir", lambda: tmp_path)
    monkeypatch.delenv("AAT_PROFILE", raising=False)

    def store(forward, backward, device=GPU):
        fake = FakeProvider(0)
        fake.device = device
        monkeypatch.setattr(providers, "get_provider", lambda: fake)
        profile.save(device, Profile({}, [Costs("float32", 64, forward, backward)], {}))

    yield store
    profile.load.cache_clear()
    profile.measured.cache_clear()


def call(dtype=torch.float32, device="cpu"):
    q = torch.zeros(1, 2, 64, 64, dtype=dtype, device=device)
    return q, q, q, TileMap.dense(full_mask(64, 64, torch.device("cpu")), 1, 2, 32, 32)


def test_it_comes_back_as_it_was_saved(measured):
    stored = Profile(
        {profile.key("forward", 16, 16): Shape(64, 4, 16)}, [Costs("float32", 64, FASTER, SLOWER)], {"add": FASTER}
    )
    measured(FASTER, FASTER)
    path = profile.save(GPU, stored)
    assert path.name == "vulkan-a-fast-gpu-0000-0000.json"
    assert profile.load(GPU) == stored
    assert profile.load(dataclasses.replace(GPU, driver=2)) == Profile.empty()  # another driver: measured anew


def test_a_broken_file_is_told_and_ignored(measured, caplog):
    measured(FASTER, FASTER)
    profile.path(GPU).write_text("{}", "utf-8")
    with caplog.at_level(logging.WARNING, "aat_hf"):
        assert profile.load(GPU) == Profile.empty()
    assert "aat calibrate --device vulkan" in caplog.text


@pytest.mark.parametrize(
    ("forward", "backward", "expected"), [(FASTER, FASTER, True), (SLOWER, FASTER, False), (FASTER, SLOWER, False)]
)
def test_only_where_both_directions_are_faster(measured, forward, backward, expected):
    measured(forward, backward)
    assert profile.pays(*call()) is expected


def test_never_unmeasured_on_a_software_driver_or_for_other_tensors(measured, monkeypatch):
    assert not profile.pays(*call())
    measured(FASTER, FASTER, dataclasses.replace(GPU, kind="cpu"))
    assert not profile.pays(*call())
    measured(FASTER, FASTER)
    assert profile.pays(*call())
    assert not profile.pays(*call(torch.float64)) and not profile.pays(*call(device="meta"))
    monkeypatch.setenv("AAT_PROFILE", "none")
    profile.measured.cache_clear()
    assert not profile.pays(*call())


def test_a_device_that_went_away(measured, monkeypatch, caplog):
    measured(FASTER, FASTER)

    def gone():
        raise VulkanUnavailableError("no driver")

    monkeypatch.setattr(providers, "get_provider", gone)
    with caplog.at_level(logging.WARNING, "aat_hf"):
        assert not profile.pays(*call()) and not profile.pays(*call())
    assert caplog.text.count("no driver") == 1


@pytest.mark.parametrize(("cost", "expected"), [(FASTER, ["vulkan"]), (SLOWER, [])])
def test_auto_follows_it(measured, monkeypatch, small, cost, expected):
    measured(cost, cost)
    used = []

    def spy(q, k, v, *_):
        used.append("vulkan")
        return torch.zeros_like(q), torch.zeros(q.shape[:3])

    monkeypatch.setattr(kernel, "vulkan_attention", spy)
    q, k, v = torch.randn(3, 1, 2, 200, 64)
    config = small.replace(backend="auto", tolerance=0.5)
    assert tiled_attention(3 * q, k, v, config=config, is_causal=True, audit=False).path == "tiled"
    assert used == expected


def test_break_even_counts_bytes_and_products():
    direction = Direction(call=1e-3, byte=1e-9, product=1e-12, cpu_product=1e-11)
    assert not direction.pays(moved=1e6, products=1e8)  # 2.1 ms against 0.9 of 1 ms
    assert direction.pays(moved=1e6, products=1e9)  # 3 ms against 9 ms
    assert not direction.pays(moved=1e7, products=1e9)  # 12 ms against 9 ms
    assert not direction.pays(moved=1e6, products=1e9, padding=8)  # 10 ms against 9 ms


@pytest.mark.parametrize(("key_tile", "expected"), [(16, True), (24, False), (32, True), (48, False), (64, True)])
def test_keys_of_a_tile_count_by_the_blocks_they_take(measured, key_tile, expected):
    even = Direction(0.0, 0.0, 0.8, 1.0)  # faster, but not with a third more to compute
    measured(even, even)
    q = torch.zeros(1, 2, 64, 64)
    tile_map = TileMap.dense(full_mask(64, 64, torch.device("cpu")), 1, 2, 32, key_tile)
    assert profile.pays(q, q, q, tile_map) is expected


@pytest.mark.parametrize(("columns", "expected"), [([0, 1], True), ([1, 2], False), ([0, 2], False)])
def test_narrow_tiles_count_by_the_blocks_they_share(measured, columns, expected):
    even = Direction(0.0, 0.0, 0.8, 1.0)
    measured(even, even)
    q, mask = torch.zeros(1, 1, 64, 64), full_mask(64, 64, torch.device("cpu"))
    levels = torch.zeros(1, 1, 1, 4, dtype=torch.uint8)
    levels[..., columns] = EXACT
    tile_map = TileMap.from_dense(levels, mask.tile_states(64, 16), 64, 16)
    assert profile.pays(q, q, q, tile_map) is expected


def test_costs_are_found_again_from_times():
    true = np.array([2e-3, 3e-9, 5e-12])
    moved, products = np.array([1e5, 1e6, 1e7, 1e7]), np.array([1e8, 1e9, 4e9, 1e9])
    seconds = true[0] + true[1] * moved + true[2] * products
    found = calibrate.fitted(np.stack([moved, products, seconds, 7e-11 * products], 1))
    assert np.allclose([found.call, found.byte, found.product, found.cpu_product], [*true, 7e-11])


def test_costs_are_never_negative():
    moved, products = np.array([1e5, 1e6, 1e7]), np.array([1e8, 1e9, 4e9])
    found = calibrate.fitted(np.stack([moved, products, np.array([1e-2, 1e-3, 2e-3]), products], 1))
    assert min(found.call, found.byte, found.product) >= 0


def test_a_measured_shape_is_used_where_it_fits(measured):
    measured(FASTER, FASTER)
    offered = candidates(GPU, "forward", 16, 16)
    assert profile.shape(GPU, "forward", 16, 16, 64) == offered[0]
    profile.save(GPU, Profile({profile.key("forward", 16, 16): offered[1]}, [], {}))
    assert profile.shape(GPU, "forward", 16, 16, 64) == offered[1]
    assert profile.shape(GPU, "forward", 16, 16, 16).own <= 16  # a tile of 16 rows would leave the others idle


@pytest.mark.vulkan
def test_the_shape_of_the_fastest_shader_is_chosen(provider, monkeypatch):
    """Timed is the shader of the role alone; here one shape of each is the fastest, by its specialisation constants."""
    fastest = {role: candidates(provider.device, role, 2, 2)[-1] for role in ("forward", "queries", "keys")}
    shaders = {"attention_backward_queries": "queries", "attention_backward_keys": "keys"}

    def seconds(provider, prepare):
        with Workspace(provider) as work:
            dispatch = prepare(work)
            best = fastest[shaders.get(dispatch.shader, "forward")]
            return float(dispatch.spec[:3] != (best.threads, best.rows, best.chunk))

    monkeypatch.setattr(calibrate, "_kernel_seconds", seconds)
    assert calibrate.tuned(provider, 1, 8, 64, 2) == {f"{role}-2-2": shape for role, shape in fastest.items()}


@pytest.mark.vulkan
def test_a_shader_is_timed_without_its_transfers(provider, monkeypatch):
    submitted, start, clock = [], provider.start, count()
    monkeypatch.setattr(provider, "start", lambda *a, **k: submitted.append((next(clock), a, k)) or start(*a, **k))
    monkeypatch.setattr(calibrate, "perf_counter", lambda: next(clock))

    def relu(work):
        source, result = work.buffers(torch.ones(8), 32)
        return plain.elementwise_dispatch(provider, "relu", source, source, result, 8)

    assert calibrate._kernel_seconds(provider, relu) == 2  # readings: before and after the second submission
    assert [place for place, *_ in submitted] == [0, 2]
    assert submitted[0][2]["upload"] and not any(submitted[1][1][1:])


def test_a_device_with_too_little_shared_memory():
    with pytest.raises(VulkanLimitError, match='backend="cpu"'):
        candidates(dataclasses.replace(GPU, max_shared_bytes=256), "forward", 16, 16)
