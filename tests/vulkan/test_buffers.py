from __future__ import annotations

import numpy as np
import pytest
from fake import DEVICE, FakeProvider
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.vulkan.buffers import BufferPool, bucket
from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanLimitError

PLANS = st.lists(st.integers(1, 5000), min_size=1, max_size=6)


@given(st.lists(st.one_of(PLANS, st.integers(0, 20)), max_size=100), st.integers(2000, 40000))
def test_counts_what_it_holds_and_never_hands_out_twice(steps: list, capacity: int):
    provider = FakeProvider(room=1 << 30)
    pool = BufferPool(provider, capacity)
    live: list[tuple[object, int]] = []
    high_water = served = 0
    for step in steps:
        if isinstance(step, int):
            if live:
                pool.recycle(live.pop(step % len(live))[0])
        else:
            before = pool.statistics.in_use, pool.statistics.requested
            try:
                buffers = pool.acquire(*step)
            except OutOfDeviceMemoryError:
                assert (pool.statistics.in_use, pool.statistics.requested) == before
                assert before[0] + sum(bucket(nbytes, provider) for nbytes in step) > capacity
            else:
                assert len({id(buffer) for buffer in [*buffers, *(other for other, _ in live)]}) == len(live) + len(
                    step
                )
                live += zip(buffers, step, strict=True)
                served += len(step)
        counts = pool.statistics
        high_water = max(high_water, counts.held)
        assert counts.in_use == sum(buffer.nbytes for buffer, _ in live)
        assert counts.requested == sum(nbytes for _, nbytes in live)
        assert all(buffer.used == nbytes <= buffer.nbytes for buffer, nbytes in live)
        assert counts.held == sum(buffer.nbytes for buffer in provider.held) <= capacity
        assert counts.high_water == high_water
    assert pool.statistics.hits + pool.statistics.misses == served
    for buffer, _ in live:
        pool.recycle(buffer)
    pool.trim()
    assert not provider.held and pool.statistics.held == 0


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.data())
def test_what_fits_a_longer_plan_needs_no_memory(sizes: list[int], data: st.DataObject):
    """Whatever the order of the requests: the k-th longest buffer serves the k-th longest request."""
    pool = BufferPool(FakeProvider(1 << 30))
    for buffer in pool.acquire(*sizes):
        pool.recycle(buffer)
    shorter = [data.draw(st.integers(1, size)) for size in sizes]
    pool.acquire(*data.draw(st.permutations(shorter)))
    assert (pool.statistics.hits, pool.statistics.misses) == (len(sizes), len(sizes))


@given(st.integers(1, DEVICE.max_storage_bytes))
def test_a_bucket_is_at_most_an_eighth_longer(nbytes: int):
    provider = FakeProvider(0)
    size = bucket(nbytes, provider)
    assert nbytes <= size < max(nbytes * 9 / 8 + 4, nbytes + 256) and bucket(size, provider) == size
    octave = {bucket(n, provider) for n in range(1 << 14, 1 << 15, 64)}
    assert len(octave) == 9 and all(bucket(1 << power, provider) == 1 << power for power in range(8, 18))


def test_a_request_beyond_the_longest_binding_is_refused():
    with pytest.raises(VulkanLimitError, match="can bind"):
        BufferPool(FakeProvider(1 << 30)).acquire(8, DEVICE.max_storage_bytes + 1)


def test_fragmentation_inside_and_outside_is_told_apart():
    pool = BufferPool(FakeProvider(1 << 30))
    (first,) = pool.acquire(1024)
    pool.recycle(first)
    assert pool.acquire(768) == [first]  # 768 of 1024
    assert pool.statistics.internal_fragmentation == 1 - 1792 / 2048
    assert pool.statistics.hit_rate == 1 / 2 and pool.statistics.external_fragmentation == 0
    (small,) = pool.acquire(256)
    pool.recycle(small)
    (large,) = pool.acquire(1 << 17)  # a little may stay idle: 256 of 1024 + 256 + 2 ** 17
    assert pool.statistics.idle == 256
    idle, held = 256, 1024 + 1280 + (1 << 17) + 1280  # at the misses
    assert pool.statistics.external_fragmentation == idle / held
    pool.recycle(large)
    with pytest.raises(ValueError, match="not in use"):
        pool.recycle(large)


def test_what_fits_nothing_is_given_back_before_more_is_taken():
    pool = BufferPool(provider := FakeProvider(1 << 30))
    for length in range(4096, 1 << 16, 4096):
        for buffer in pool.acquire(length, length // 2, 12):
            pool.recycle(buffer)
    assert len(provider.held) == 3 and pool.statistics.high_water < 1.25 * 1.5 * (1 << 16)
    assert pool.statistics.external_fragmentation < 0.01


def test_a_planned_operation_wastes_nothing_and_is_met_again():
    pool, sizes = BufferPool(FakeProvider(1 << 30)), (4096, 1024, 256, 4096)
    first = None
    for _ in range(200):
        buffers = pool.acquire(*sizes)
        assert buffers == (first := first or buffers)  # the same ones for the same roles
        for buffer in reversed(buffers):
            pool.recycle(buffer)
    counts = pool.statistics
    assert counts.internal_fragmentation == counts.external_fragmentation == 0
    assert counts.hit_rate == 199 / 200 and counts.high_water == sum(sizes)


def test_a_plan_is_all_or_nothing():
    pool = BufferPool(FakeProvider(1 << 30), capacity=1024)
    with pytest.raises(OutOfDeviceMemoryError, match="exceed"):
        pool.acquire(512, 512, 256)
    assert pool.statistics.held == 0
    pool = BufferPool(FakeProvider(1100), capacity=4096)
    with pytest.raises(OutOfDeviceMemoryError, match="full"):
        pool.acquire(512, 512, 256)
    assert pool.statistics.in_use == 0 and pool.statistics.held == 1024 == pool.statistics.high_water


def test_room_is_made_for_a_full_device():
    provider = FakeProvider(room=1 << 17)
    pool = BufferPool(provider, capacity=1 << 20)
    (small,) = pool.acquire(512)
    pool.recycle(small)
    (buffer,) = pool.acquire(1 << 17)  # the idle 512 could stay, but for the device
    assert provider.held == [buffer] and pool.statistics.evictions == 1
    with pytest.raises(OutOfDeviceMemoryError):
        pool.acquire(8192)


@pytest.mark.vulkan
def test_buffers_of_a_device_are_used_again(provider):
    pool = BufferPool(provider)
    (buffer,) = pool.acquire(1000)
    buffer.view()[:] = 7
    pool.recycle(buffer)
    (again,) = pool.acquire(700)
    assert again is buffer and again.used == 700 and np.all(again.view() == 7)
    pool.recycle(again)
    pool.trim()
    assert pool.statistics.held == 0
