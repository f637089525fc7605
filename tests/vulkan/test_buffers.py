from __future__ import annotations

import numpy as np
import pytest
from fake import DEVICE, FakeProvider
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.vulkan.buffers import BufferPool, bucket
from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanLimitError

REQUESTS = st.tuples(st.integers(1, 5000), st.booleans())


@given(st.lists(st.one_of(REQUESTS, st.integers(0, 20)), max_size=200), st.integers(2000, 40000))
def test_counts_what_it_holds_and_never_hands_out_twice(steps: list, capacity: int):
    provider = FakeProvider(room=1 << 30)
    pool = BufferPool(provider, capacity)
    live: list[tuple[object, int]] = []
    high_water = refused = 0
    for step in steps:
        if isinstance(step, int):
            if live:
                pool.recycle(live.pop(step % len(live))[0])
        else:
            nbytes, exact = step
            try:
                buffer = pool.acquire(nbytes, exact=exact)
            except OutOfDeviceMemoryError:
                refused += 1
                assert sum(held.nbytes for held, _ in live) + bucket(nbytes, provider, exact=exact) > capacity
            else:
                assert all(buffer is not other for other, _ in live)
                live.append((buffer, nbytes))
        counts = pool.statistics
        high_water = max(high_water, counts.held)
        assert counts.in_use == sum(buffer.nbytes for buffer, _ in live)
        assert counts.requested == sum(nbytes for _, nbytes in live)
        assert counts.held == sum(buffer.nbytes for buffer in provider.held) <= capacity
        assert counts.high_water == high_water
    assert pool.statistics.hits + pool.statistics.misses + refused == sum(isinstance(step, tuple) for step in steps)
    for buffer, _ in live:
        pool.recycle(buffer)
    pool.trim()
    assert not provider.held and pool.statistics.held == 0


@given(st.integers(1, DEVICE.max_storage_bytes))
def test_buckets_are_powers_of_two_or_exact_words(nbytes: int):
    provider = FakeProvider(0)
    size = bucket(nbytes, provider)
    assert size >= nbytes and size & (size - 1) == 0 and (size == 256 or size < 2 * nbytes)
    assert 0 <= bucket(nbytes, provider, exact=True) - nbytes < 4


def test_a_request_beyond_the_longest_binding_is_refused():
    with pytest.raises(VulkanLimitError, match="can bind"):
        BufferPool(FakeProvider(1 << 30)).acquire(DEVICE.max_storage_bytes + 1)


def test_fragmentation_inside_and_outside_is_told_apart():
    pool = BufferPool(FakeProvider(1 << 30))
    first = pool.acquire(768)  # of 1024
    assert pool.statistics.internal_fragmentation == 0.25 and pool.statistics.external_fragmentation == 0
    pool.recycle(first)
    assert pool.acquire(1024) is first  # 1792 of 2048
    assert pool.statistics.internal_fragmentation == 1 - 1792 / 2048
    pool.recycle(first)
    second = pool.acquire(2048)  # 1024 of 1024 held lie idle
    third = pool.acquire(2048)  # 1024 of 3072
    assert pool.statistics.external_fragmentation == 2048 / 4096
    assert pool.statistics.hit_rate == 1 / 4
    pool.recycle(second)
    with pytest.raises(ValueError, match="not in use"):
        pool.recycle(second)
    pool.recycle(third)


def test_a_planned_arena_wastes_nothing_and_is_met_again():
    pool, sizes = BufferPool(FakeProvider(1 << 30)), (4096, 1000, 12, 4096)
    for _ in range(200):
        with pool.lease(sizes, exact=True) as buffers:
            assert [buffer.nbytes for buffer in buffers] == list(sizes)
    counts = pool.statistics
    assert counts.internal_fragmentation == counts.external_fragmentation == 0
    assert counts.hit_rate == 199 / 200 and counts.high_water == sum(sizes)


def test_a_lease_is_all_or_nothing():
    pool = BufferPool(FakeProvider(1 << 30), capacity=1024)
    with pytest.raises(OutOfDeviceMemoryError, match="exceed"), pool.lease([512, 512, 256]):
        pass
    assert pool.statistics.in_use == 0 and pool.statistics.idle <= 1024


def test_room_is_made_for_a_full_device():
    provider = FakeProvider(room=4096)
    pool = BufferPool(provider, capacity=1 << 20)
    pool.recycle(pool.acquire(4096))
    buffer = pool.acquire(256)
    assert provider.held == [buffer] and pool.statistics.evictions == 1
    with pytest.raises(OutOfDeviceMemoryError):
        pool.acquire(8192)


@pytest.mark.vulkan
def test_buffers_of_a_device_are_used_again(provider):
    pool = BufferPool(provider)
    buffer = pool.acquire(1000)
    buffer.view()[:] = 7
    pool.recycle(buffer)
    again = pool.acquire(700)
    assert again is buffer and np.all(again.view() == 7)
    pool.recycle(again)
    pool.trim()
    assert pool.statistics.held == 0
