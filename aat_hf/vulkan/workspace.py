"""The buffers of one operation: taken from the provider's pool together, filled, read, given back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.vulkan import lowering
from aat_hf.vulkan.buffers import BufferPool
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider

Content: TypeAlias = "Tensor | NDArray[np.generic] | int"
"""Rows of a tensor (..., dim) in its own dtype, padded to whole vectors; 32-bit words of an array; or room in bytes."""

_LONG = 1 << 20  # bytes whose copy to the device is worth a submission of its own
_pools: dict[Provider, BufferPool] = {}  # a pool keeps its provider
_lock = threading.Lock()


def pool_of(provider: Provider) -> BufferPool:
    """The pool that all operations of a provider share."""
    with _lock:
        return _pools.setdefault(provider, BufferPool(provider))


def rates() -> dict[str, float]:
    """Hit rates, fragmentation and memory of the device last opened, since the start; empty before it computed."""
    if not _pools:
        return {}
    provider, pool = next(reversed(_pools.items()))
    return {
        "pool_hit_rate": pool.statistics.hit_rate,
        "pool_internal_fragmentation": pool.statistics.internal_fragmentation,
        "pool_external_fragmentation": pool.statistics.external_fragmentation,
        "pool_high_water_mib": pool.statistics.high_water / 2**20,
        "pipeline_hit_rate": provider.pipelines.hit_rate,
        "pipeline_miss_ms": 1e3 * provider.pipelines.mean_miss_seconds,
    }


class Workspace:
    """Buffers that live as long as the `with` block; what `buffers` filled is on the device with the next `run`."""

    def __init__(self, provider: Provider) -> None:
        self._provider, self._pool = provider, pool_of(provider)
        self._owned: list[Buffer] = []
        self._fresh: list[Buffer] = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for buffer in self._owned:
            self._pool.recycle(buffer)

    def buffers(self, *contents: Content) -> list[Buffer]:
        """A buffer for each of the contents; they are planned together.

        Raises:
            VulkanLimitError, OutOfDeviceMemoryError: as `BufferPool.acquire`; nothing was taken.
        """
        taken = self._pool.acquire(*map(_size, contents))
        self._owned += taken
        for buffer, content in zip(taken, contents, strict=True):
            if isinstance(content, int):
                continue
            if isinstance(content, Tensor):
                lowering.write_rows(buffer, content)
            else:
                lowering.write_words(buffer, content)
            if buffer.used >= _LONG:
                self._provider.send(buffer)  # while the next is written
            else:
                self._fresh.append(buffer)
        return taken

    def run(
        self, *dispatches: Dispatch, fetch: tuple[Buffer, ...] = (), meanwhile: Callable[[], object] | None = None
    ) -> None:
        """Upload what is new, run, download `fetch`; `meanwhile` as in `Provider.submit`."""
        fresh, self._fresh = self._fresh, []
        self._provider.submit(dispatches, upload=fresh, download=fetch, meanwhile=meanwhile)


def _size(content: Content) -> int:
    """Bytes of a buffer for it."""
    if isinstance(content, int):
        return max(4, content)
    return lowering.row_bytes(content) if isinstance(content, Tensor) else max(4, content.nbytes)
