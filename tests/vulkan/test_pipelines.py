from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.vulkan.pipelines import PipelineCache


@given(st.integers(1, 5), st.lists(st.integers(0, 8), max_size=60))
def test_behaves_as_a_list_in_order_of_use(capacity: int, keys: list[int]):
    dropped: list[int] = []
    cache = PipelineCache(capacity, lambda key: key * key, dropped.append)
    model: OrderedDict[int, int] = OrderedDict()
    hits, expected_drops = 0, []
    for key in keys:
        hits += key in model
        model[key] = key * key
        model.move_to_end(key)
        if len(model) > capacity:
            expected_drops.append(model.popitem(last=False)[1])
        assert cache.get(key) == key * key
    assert {key for key in range(9) if key in cache} == set(model) and len(cache) == len(model)
    assert dropped == expected_drops
    assert (cache.statistics.hits, cache.statistics.misses) == (hits, len(keys) - hits)
    assert cache.statistics.hit_rate == (hits / len(keys) if keys else 1.0)


def test_discards_by_key_and_counts():
    dropped: list[str] = []
    cache = PipelineCache(9, str, dropped.append)
    for key in range(5):
        cache.get(key)
    cache.discard(lambda key: key % 2 == 0)
    assert dropped == ["0", "2", "4"] and cache.statistics.evictions == 3
    cache.clear()
    assert len(cache) == 0 and cache.statistics.evictions == 5


def test_a_failed_miss_leaves_nothing():
    def fails(key: int) -> int:
        raise RuntimeError("no compiler")

    cache = PipelineCache(2, fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        cache.get(1)
    assert len(cache) == 0 and cache.statistics.misses == 0 and cache.statistics.mean_miss_seconds == 0


def test_times_its_misses(monkeypatch: pytest.MonkeyPatch):
    clock = iter([1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("aat_hf.vulkan.pipelines.time.perf_counter", lambda: next(clock))
    cache = PipelineCache(2, str)
    for key in (1, 1, 2):
        cache.get(key)
    assert cache.statistics.mean_miss_seconds == 1.5 and cache.statistics.slowest_miss_seconds == 2


def test_needs_room_for_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        PipelineCache(0, str)
