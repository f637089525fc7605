"""A pool of device buffers: memory that was used once is used again, because making it anew costs milliseconds.

Sizes are rounded up to powers of two, so that few kinds of buffer serve all requests, or kept exact where they are
planned from a tile map and recur. Two kinds of waste are counted apart: *internal* fragmentation is what rounding adds
to buffers in use; *external* fragmentation is memory that lay idle when a request found no buffer of its size.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from aat_hf.vulkan import limits
from aat_hf.vulkan.errors import OutOfDeviceMemoryError
from aat_hf.vulkan.interface import Buffer, Provider

_SMALLEST = 256
_SHARE = 0.5  # of the device's heap; the rest is left to other programs


@dataclass
class PoolStatistics:
    """Counters of a `BufferPool`, in bytes but for the first three.

    Attributes:
        hits, misses: requests met with an idle buffer, and with a new one.
        evictions: idle buffers given back to the device to make room.
        requested, in_use: asked for, and handed out for it, at present; idle: kept for later.
        high_water: the most that was held, in use and idle.
        requested_total, handed_total: of all requests since the start.
        idle_at_misses, held_at_misses: summed over the misses, before the new buffer.
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


class BufferPool:
    """Buffers of one provider, usable from any thread.

    Args:
        capacity: bytes held at most; None: half of the device's heap.
    """

    def __init__(self, provider: Provider, capacity: int | None = None) -> None:
        self.capacity = int(_SHARE * provider.device.heap_bytes) if capacity is None else capacity
        self.statistics = PoolStatistics()
        self._provider = provider
        self._lock = threading.RLock()
        self._idle: OrderedDict[int, Buffer] = OrderedDict()  # by id, least recently used first
        self._requested: dict[int, tuple[Buffer, int]] = {}  # in use, by id, with what was asked for

    @contextmanager
    def lease(self, sizes: Sequence[int], *, exact: bool = False) -> Iterator[list[Buffer]]:
        """Buffers of at least `sizes` bytes for the length of a `with`: all of them, or none.

        Args:
            exact: of exactly these sizes (in words): an arena planned ahead.
        """
        taken: list[Buffer] = []
        try:
            for nbytes in sizes:
                taken.append(self.acquire(nbytes, exact=exact))
            yield taken
        finally:
            for buffer in taken:
                self.recycle(buffer)

    def acquire(self, nbytes: int, *, exact: bool = False) -> Buffer:
        """A buffer of at least `nbytes`, contents undefined; give it back with `recycle`.

        Raises:
            VulkanLimitError: longer than a shader can bind.
            OutOfDeviceMemoryError: no room within the capacity, or on the device, even without the idle buffers.
        """
        size = bucket(nbytes, self._provider, exact=exact)
        with self._lock:
            found = next((buffer for buffer in reversed(self._idle.values()) if buffer.nbytes == size), None)
            if found is None:
                found = self._make(size)
                self.statistics.misses += 1
            else:
                del self._idle[id(found)]
                self.statistics.hits += 1
                self.statistics.idle -= size
            self._requested[id(found)] = found, nbytes
            self._count(size, nbytes)
            return found

    def recycle(self, buffer: Buffer) -> None:
        """Take a buffer back, to be handed out again."""
        with self._lock:
            found, nbytes = self._requested.pop(id(buffer), (None, 0))
            if found is None:
                raise ValueError("this buffer is not in use: it was recycled before, or belongs to another pool")
            self.statistics.requested -= nbytes
            self.statistics.in_use -= buffer.nbytes
            self.statistics.idle += buffer.nbytes
            self._idle[id(buffer)] = buffer

    def trim(self, nbytes: int = 0) -> None:
        """Give idle buffers back to the device, least recently used first, until at most `nbytes` are idle."""
        with self._lock:
            while self.statistics.idle > nbytes:
                _, buffer = self._idle.popitem(last=False)
                self.statistics.idle -= buffer.nbytes
                self.statistics.evictions += 1
                self._provider.release(buffer)

    def _make(self, size: int) -> Buffer:
        self.statistics.idle_at_misses += self.statistics.idle
        self.statistics.held_at_misses += self.statistics.held
        room = self.capacity - self.statistics.in_use - size
        if room < 0:
            raise OutOfDeviceMemoryError(
                f"{size} bytes more than the {self.statistics.in_use} in use exceed the pool's {self.capacity} bytes "
                f"on {self._provider.device.name}: use a shorter input, or the CPU"
            )
        self.trim(room)
        try:
            return self._provider.buffer(size)
        except OutOfDeviceMemoryError:
            if not self._idle:
                raise
        self.trim()
        return self._provider.buffer(size)

    def _count(self, size: int, nbytes: int) -> None:
        counts = self.statistics
        counts.requested += nbytes
        counts.requested_total += nbytes
        counts.in_use += size
        counts.handed_total += size
        counts.high_water = max(counts.high_water, counts.held)


def bucket(nbytes: int, provider: Provider, *, exact: bool = False) -> int:
    """The size of buffer that serves a request: a power of two of at least 256, or whole words.

    Raises:
        VulkanLimitError: longer than a shader can bind.
    """
    words = limits.check_size(nbytes, provider.device)
    if exact:
        return words
    rounded = max(_SMALLEST, 1 << (words - 1).bit_length())
    return rounded if rounded <= limits.longest(provider.device) else words
