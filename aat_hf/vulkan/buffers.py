"""A pool of device buffers: memory that was used once is used again, because making it anew costs milliseconds.

The buffers of an operation are planned together: its tensors and tile map say how long each has to be. Every request
takes the smallest idle buffer that is long enough; only where there is none, memory is taken from the device, and what
then lies idle and fits nothing is given back first. Two kinds of waste are counted apart: *internal* fragmentation is
what buffers are longer than asked for; *external* fragmentation is memory that lay idle while more was taken.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from threading import RLock
from typing import NamedTuple

from aat_hf.vulkan import limits
from aat_hf.vulkan.errors import OutOfDeviceMemoryError
from aat_hf.vulkan.interface import Buffer, Provider

_SMALLEST = 256
_CLASSES = 8  # sizes between two powers of two: an input that grows step by step is met again
_SHARE = 0.5  # of the device's heap; the rest is left to other programs
_IDLE_SHARE = 1 / 128  # of the held memory that may lie idle while more is taken


@dataclass
class PoolStatistics:
    """Counters of a `BufferPool`, in bytes but for the first three.

    Attributes:
        hits, misses: requests met with an idle buffer, and with a new one.
        evictions: idle buffers given back to the device to make room.
        requested, in_use: asked for, and handed out for it, at present; idle: kept for later.
        high_water: the most that was held, in use and idle.
        requested_total, handed_total: of all requests since the start.
        idle_at_misses, held_at_misses: summed over the plans that took new memory, once they had it.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    requested: int = 0
    in_use: int = 0
    idle: int = 0
    high_water: int = 0
    requested_total: int = 0
    handed_total: int = 0
    idle_at_misses: int = 0
    held_at_misses: int = 0

    @property
    def held(self) -> int:
        """Bytes taken from the device."""
        return self.in_use + self.idle

    @property
    def hit_rate(self) -> float:
        """Hits among all requests; 1 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def internal_fragmentation(self) -> float:
        """Share of the bytes handed out that nobody asked for, over all requests."""
        return 1 - self.requested_total / self.handed_total if self.handed_total else 0.0

    @property
    def external_fragmentation(self) -> float:
        """Share of the held bytes that lay idle, and fitted no request, when buffers had to be made."""
        return self.idle_at_misses / self.held_at_misses if self.held_at_misses else 0.0


class _Held(NamedTuple):
    """A buffer of the pool; the number orders buffers of one length, so that equal calls get equal buffers."""

    nbytes: int
    number: int
    buffer: Buffer


class BufferPool:
    """Buffers of one provider, usable from any thread.

    Args:
        capacity: bytes held at most; None: half of the device's heap.
    """

    def __init__(self, provider: Provider, capacity: int | None = None) -> None:
        self.capacity = int(_SHARE * provider.device.heap_bytes) if capacity is None else capacity
        self.statistics = PoolStatistics()
        self._provider = provider
        self._lock = RLock()
        self._numbers = count()
        self._idle: list[_Held] = []  # sorted: shortest first
        self._used: dict[int, tuple[_Held, int]] = {}  # by the buffer's id, with what was asked for

    def acquire(self, *sizes: int) -> list[Buffer]:
        """Buffers of at least so many bytes, contents undefined, all or none; give them back with `recycle`.

        Raises:
            VulkanLimitError: one is longer than a shader can bind.
            OutOfDeviceMemoryError: no room within the capacity, or on the device, even without the idle buffers.
        """
        lengths = [bucket(nbytes, self._provider) for nbytes in sizes]
        with self._lock:
            found = [self._take_idle(nbytes) for nbytes in sizes]
            missing = [place for place, held in enumerate(found) if held is None]
            try:
                self._make_room(sum(lengths[place] for place in missing))
                for place in missing:
                    found[place] = self._make(lengths[place])
            except BaseException:
                for held in filter(None, found):
                    self._put_idle(held)
                raise
            held_ones = [held for held in found if held is not None]
            self._count(held_ones, sizes, len(missing))
            return [held.buffer for held in held_ones]

    def recycle(self, buffer: Buffer) -> None:
        """Take a buffer back, to be handed out again."""
        with self._lock:
            if id(buffer) not in self._used:
                raise ValueError("this buffer is not in use: it was recycled before, or belongs to another pool")
            held, nbytes = self._used.pop(id(buffer))
            self.statistics.requested -= nbytes
            self._put_idle(held)

    def trim(self, nbytes: int = 0) -> None:
        """Give idle buffers back to the device, longest first, until at most `nbytes` are idle."""
        with self._lock:
            while self.statistics.idle > nbytes:
                held = self._idle.pop()
                self.statistics.idle -= held.nbytes
                self.statistics.evictions += 1
                self._provider.release(held.buffer)

    def _take_idle(self, nbytes: int) -> _Held | None:
        """The shortest idle buffer that is long enough: no choice leaves more to the requests that follow."""
        place = bisect_left(self._idle, nbytes, key=lambda held: held.nbytes)
        if place == len(self._idle):
            return None
        held = self._idle.pop(place)
        self.statistics.idle -= held.nbytes
        self.statistics.in_use += held.nbytes
        return held

    def _put_idle(self, held: _Held) -> None:
        self.statistics.in_use -= held.nbytes
        self.statistics.idle += held.nbytes
        insort(self._idle, held, key=lambda held: held[:2])

    def _make_room(self, nbytes: int) -> None:
        """Before taking `nbytes` from the device."""
        if not nbytes:
            return
        busy = self.statistics.in_use + nbytes
        if busy > self.capacity:
            raise OutOfDeviceMemoryError(
                f"{nbytes} bytes more than the {self.statistics.in_use} in use exceed the pool's {self.capacity} bytes "
                f"on {self._provider.device.name}: use a shorter input, or the CPU"
            )
        self.trim(min(int(_IDLE_SHARE * busy), self.capacity - busy))

    def _make(self, length: int) -> _Held:
        try:
            buffer = self._provider.buffer(length)
        except OutOfDeviceMemoryError:
            if not self._idle:
                raise
            self.trim()
            buffer = self._provider.buffer(length)
        self.statistics.in_use += buffer.nbytes
        self.statistics.high_water = max(self.statistics.high_water, self.statistics.held)
        return _Held(buffer.nbytes, next(self._numbers), buffer)

    def _count(self, found: list[_Held], sizes: Sequence[int], misses: int) -> None:
        counts = self.statistics
        counts.misses += misses
        counts.hits += len(found) - misses
        for held, nbytes in zip(found, sizes, strict=True):
            held.buffer.used = nbytes
            self._used[id(held.buffer)] = held, nbytes
            counts.handed_total += held.nbytes
        counts.requested += sum(sizes)
        counts.requested_total += sum(sizes)
        if misses:
            counts.idle_at_misses += counts.idle
            counts.held_at_misses += counts.held


def bucket(nbytes: int, provider: Provider) -> int:
    """The length of a new buffer that serves a request: at most an eighth more, one of eight between powers of two.

    Raises:
        VulkanLimitError: longer than a shader can bind.
    """
    words = limits.check_size(nbytes, provider.device)
    step = max(_SMALLEST, (1 << (words - 1).bit_length()) // 2 // _CLASSES)
    rounded = -(-words // step) * step
    return rounded if rounded <= limits.longest(provider.device) else words
