"""Both bindings, with unified memory and with copies, run the same shaders to the same results."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

from aat_hf.vulkan.errors import VulkanError, VulkanLimitError
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider, float_bits
from aat_hf.vulkan.provider import make

pytestmark = pytest.mark.vulkan
COUNT = 100


def numbers(buffer: Buffer) -> np.ndarray:
    return buffer.view().view(np.float32)


def step(source: Buffer, target: Buffer, factor: float = 1.0, offset: int = 0, group: int = 32) -> Dispatch:
    """target = factor * source + offset."""
    return Dispatch("smoke", (source, target), (-(-COUNT // group), 1, 1), (group, offset), (COUNT, float_bits(factor)))


@pytest.fixture
def xyz(provider: Provider):
    buffers = [provider.buffer(4 * COUNT) for _ in range(3)]
    for buffer in buffers:
        numbers(buffer)[:] = np.arange(COUNT)
    yield buffers
    for buffer in buffers:
        provider.release(buffer)


@pytest.mark.parametrize("group", [1, 7, 64])
@pytest.mark.parametrize("factor", [0.0, -2.5, 1e30])
def test_constants_reach_the_shader(provider, xyz, factor: float, group: int):
    x, y, _ = xyz
    provider.submit([step(x, y, factor, offset=3, group=group)], upload=[x], download=[y])
    assert np.array_equal(numbers(y), np.float32(factor) * np.arange(COUNT, dtype=np.float32) + 3)


def test_a_chain_of_dependent_dispatches(provider, xyz):
    x, y, z = xyz
    steps = [step(x, y, 1.0, 1), step(y, z, 1.0, 2), step(z, x, 1.0, 3)] * 20
    provider.submit(steps, upload=[x], download=[x, y])
    assert np.array_equal(numbers(x), np.arange(COUNT) + 120)
    assert np.array_equal(numbers(y), np.arange(COUNT) + 115)


def test_in_place_and_a_buffer_that_goes_both_ways(provider, xyz):
    x, y, _ = xyz
    for round_ in range(1, 4):
        provider.submit([step(x, x, 2.0)], upload=[x], download=[x])
        assert np.array_equal(numbers(x), np.arange(COUNT) * 2.0**round_)
    provider.submit([], upload=[y], download=[y])
    assert np.array_equal(numbers(y), np.arange(COUNT))


def test_data_stays_on_the_device_between_submissions(provider, xyz):
    x, y, z = xyz
    provider.submit([step(x, y, 3.0)], upload=[x])
    provider.submit([step(y, z, 1.0, 1)])
    provider.submit([], download=[z])
    assert np.array_equal(numbers(z), 3 * np.arange(COUNT) + 1)


def test_what_was_sent_is_there(provider, xyz):
    x, y, z = xyz
    for round_ in range(3):
        numbers(x)[:], numbers(z)[:] = round_, 10 + round_
        for buffer in (x, z):
            provider.send(buffer)
        numbers(y)[:] = -1
        provider.submit([step(x, y, 2.0), step(z, x)], download=[x, y])
        assert np.all(numbers(y) == 2 * round_) and np.all(numbers(x) == 10 + round_)


def test_submissions_that_are_waited_for_later(provider, xyz):
    """In any order; each sees what those started before it wrote, and what was sent while they ran."""
    x, y, z = xyz
    other, last = provider.buffer(4 * COUNT), provider.buffer(4 * COUNT)
    for round_ in range(3):
        first = provider.start([step(x, y, 2.0), step(y, z)], upload=[x], download=[z])  # two batches
        numbers(other)[:] = round_
        provider.send(other)
        second = provider.start([step(z, y, 3.0)], download=[y])
        third = provider.start([step(other, last, 1.0, 1)], download=[last])
        for wait in (third, first, second) if round_ % 2 else (first, second, third):
            wait()
        assert np.array_equal(numbers(z), 2 * np.arange(COUNT))
        assert np.array_equal(numbers(y), 6 * np.arange(COUNT))
        assert np.all(numbers(last) == round_ + 1)
    for buffer in (other, last):
        provider.release(buffer)


def test_a_buffer_in_flight_may_be_released(provider, xyz):
    x, y, _ = xyz
    buffer = provider.buffer(4 * COUNT)
    wait = provider.start([step(x, y), step(x, buffer)], upload=[x], download=[y])
    provider.release(buffer)
    wait()
    assert np.array_equal(numbers(y), np.arange(COUNT))


def test_waiting_for_a_closed_provider_is_an_error(binding, device):
    made = make(binding, device)
    x, y = made.buffer(4 * COUNT), made.buffer(4 * COUNT)
    wait = made.start([step(x, y)], upload=[x], download=[y])
    made.close()
    if made.overlaps:
        with pytest.raises(VulkanError, match="closed"):
            wait()


def test_a_sent_buffer_may_be_released(provider, xyz):
    x, y, _ = xyz
    for _ in range(3):
        buffer = provider.buffer(4 * COUNT)
        provider.send(buffer)
        provider.release(buffer)
        with pytest.raises(VulkanError, match="released"):
            provider.send(buffer)
    provider.submit([step(x, y)], upload=[x], download=[y])
    assert np.array_equal(numbers(y), np.arange(COUNT))


def test_pipelines_are_compiled_once(provider, xyz):
    x, y, _ = xyz
    provider.submit([step(x, y, offset=9)], upload=[x])
    hits, misses = provider.pipelines.hits, provider.pipelines.misses
    for factor in (1.0, 2.0, 3.0):
        provider.submit([step(x, y, factor, offset=9)], download=[y])
    assert np.array_equal(numbers(y), 3 * np.arange(COUNT) + 9)
    assert (provider.pipelines.hits, provider.pipelines.misses) == (hits + 3, misses)


def test_more_pipelines_than_are_kept(provider, xyz, monkeypatch: pytest.MonkeyPatch):
    """What is dropped from the cache while a submission is recorded still runs."""
    x, y, _ = xyz
    cache = provider._algorithms if provider.name == "kompute" else provider._cache
    cache.clear()
    monkeypatch.setattr(cache, "_capacity", 2)
    evictions = provider.pipelines.evictions
    provider.submit([step(x, y, offset=offset) for offset in range(100, 106)], [x], [y])
    assert np.array_equal(numbers(y), np.arange(COUNT) + 105)
    assert provider.pipelines.evictions == evictions + 4 and len(cache) == 2


def test_a_released_buffer_is_refused_and_its_view_stays(provider):
    buffer, other = provider.buffer(4 * COUNT), provider.buffer(4 * COUNT)
    numbers(buffer)[:] = 5
    view = buffer.view()[8:]
    provider.submit([step(buffer, other)], upload=[buffer])  # binds it to an algorithm, or a descriptor set
    provider.release(buffer)
    with pytest.raises(VulkanError, match="released"):
        provider.submit([step(buffer, other)])
    with pytest.raises(VulkanError, match="released"):
        provider.release(buffer)
    with pytest.raises(VulkanError, match="released"):
        buffer.view()
    del buffer
    gc.collect()
    assert np.all(view.view(np.float32) == 5)
    provider.release(other)


def test_a_foreign_buffer_is_refused(provider, xyz):
    class Foreign:
        nbytes = 400

    with pytest.raises(VulkanError, match="another provider"):
        provider.submit([Dispatch("smoke", (xyz[0], Foreign()), (1, 1, 1), (32, 0), (COUNT, 0))])


def test_a_refused_submission_runs_nothing(provider, xyz):
    x, y, _ = xyz
    numbers(y)[:] = -1
    provider.submit([], upload=[y])
    good, bad = step(x, y), Dispatch("smoke", (x, y), (2**20, 1, 1), (32, 0), (COUNT, 0))
    with pytest.raises(VulkanLimitError):
        provider.submit([good, bad], upload=[x])
    provider.submit([], download=[y])
    assert np.all(numbers(y) == -1)


def test_sizes_are_rounded_up_to_words_and_limited(provider):
    buffer = provider.buffer(5)
    assert buffer.nbytes == 8 and buffer.view().shape == (8,)
    provider.release(buffer)
    for nbytes in (0, provider.device.max_storage_bytes + 1, 2**32 + 4):
        with pytest.raises(VulkanLimitError):
            provider.buffer(nbytes)


def test_threads_share_a_provider(provider):
    wrong: list[int] = []

    def work(seed: int) -> None:
        x, y = provider.buffer(4 * COUNT), provider.buffer(4 * COUNT)
        for round_ in range(20):
            numbers(x)[:] = seed * 1000 + round_
            provider.submit([step(x, y, 2.0)], upload=[x], download=[y])
            if not np.all(numbers(y) == 2 * (seed * 1000 + round_)):
                wrong.append(seed)
        provider.release(x)
        provider.release(y)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_is_steady_over_a_thousand_submissions(provider, xyz):
    resource = pytest.importorskip("resource")
    x, y, _ = xyz
    peaks = []
    for _ in range(3):
        for _ in range(500):
            provider.submit([step(x, y, 2.0)], upload=[x], download=[y])
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peaks[2] - peaks[1] < 1024  # kB
