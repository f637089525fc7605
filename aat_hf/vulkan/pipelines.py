"""A cache of compiled shaders: least recently used out first, hits and the cost of misses counted."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass
class CacheStatistics:
    """Counters of a `PipelineCache`.

    Attributes:
        hits, misses: look-ups that found their entry, and that had to make it.
        evictions: entries dropped, for room or with a buffer they were bound to.
        miss_seconds: total and slowest time that making entries took.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    miss_seconds: float = 0.0
    slowest_miss_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Hits among all look-ups; 1 before the first."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0

    @property
    def mean_miss_seconds(self) -> float:
        """Mean cost of a miss; 0 before the first."""
        return self.miss_seconds / self.misses if self.misses else 0.0


class PipelineCache(Generic[Key, Value]):
    """At most `capacity` entries.

    Not synchronised: its owner holds a lock while it looks up and uses an entry.

    Args:
        capacity: entries kept, at least 1.
        make: builds the entry of a key; what it raises passes through and leaves the cache as it was.
        destroy: called with each entry that leaves; None: entries free themselves.
    """

    def __init__(
        self, capacity: int, make: Callable[[Key], Value], destroy: Callable[[Value], object] | None = None
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {capacity}")
        self.statistics = CacheStatistics()
        self._capacity, self._make, self._destroy = capacity, make, destroy
        self._entries: OrderedDict[Key, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key) -> Value:
        """The entry of `key`, made when it is new."""
        if key in self._entries:
            self.statistics.hits += 1
            self._entries.move_to_end(key)
            return self._entries[key]
        began = time.perf_counter()
        value = self._make(key)
        seconds = time.perf_counter() - began
        self.statistics.misses += 1
        self.statistics.miss_seconds += seconds
        self.statistics.slowest_miss_seconds = max(self.statistics.slowest_miss_seconds, seconds)
        self._entries[key] = value
        if len(self._entries) > self._capacity:
            self._drop(next(iter(self._entries)))
        return value

    def discard(self, condition: Callable[[Key], bool]) -> None:
        """Drop the entries whose key meets `condition`."""
        for key in [key for key in self._entries if condition(key)]:
            self._drop(key)

    def clear(self) -> None:
        """Drop all entries."""
        self.discard(lambda _: True)

    def _drop(self, key: Key) -> None:
        self.statistics.evictions += 1
        value = self._entries.pop(key)
        if self._destroy is not None:
            self._destroy(value)
