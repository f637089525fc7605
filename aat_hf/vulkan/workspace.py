"""The buffers of one operation: taken from the provider's pool together, filled, read, given back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.vulkan import lowering
from aat_hf.vulkan.buffers import BufferPool
from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider

Content: TypeAlias = "Tensor | NDArray[np.generic] | int"
"""Rows of a tensor (..., dim) in its own dtype, padded to whole vectors; 32-bit words of an array; or room in bytes."""

_LONG = 1 << 20  # bytes whose copy to the device is worth a submission of its own
_TOGETHER = 24 << 20  # bytes from which that is not delayed until more is written
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
        self._sent = False  # whether something is on its way for the next `start`
        self._started: list[Callable[[], None]] = []  # what waits for it

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._finish_all()
        except VulkanError:
            if kind is None:
                raise
        finally:
            for buffer in self._owned:
                self._pool.recycle(buffer)

    def buffers(self, *contents: Content) -> list[Buffer]:
        """A buffer for each of the contents; they are planned together.

        Raises:
            VulkanLimitError, OutOfDeviceMemoryError: as `BufferPool.acquire`; nothing was taken.
        """
        taken = self._pool.acquire(*map(_size, contents))
        self._owned += taken
        long: list[Buffer] = []
        for buffer, content in zip(taken, contents, strict=True):
            if isinstance(content, int):
                continue
            if isinstance(content, Tensor):
                lowering.write_rows(buffer, content)
            else:
                lowering.write_words(buffer, content)
            if buffer.used < _LONG:
                self._fresh.append(buffer)
            elif sum(x.used for x in (*long, buffer)) < _TOGETHER:
                long.append(buffer)
            else:
                self._send(*long, buffer)  # while the next is written
                long = []
        if long:
            self._send(*long)
        return taken

    def _send(self, *buffers: Buffer) -> None:
        self._provider.send(*buffers)
        self._sent = True

    def run(self, *dispatches: Dispatch, fetch: tuple[Buffer, ...] = ()) -> None:
        """Upload what is new, run, download `fetch`."""
        self.start(*dispatches, fetch=fetch)()

    def start(self, *dispatches: Dispatch, fetch: tuple[Buffer, ...] = ()) -> Callable[[], None]:
        """`run` that returns while the device works; what it returns waits."""
        fresh, self._fresh = self._fresh, []
        wait = self._provider.start(dispatches, upload=fresh, download=fetch)
        self._sent = False
        self._started.append(wait)
        return partial(self._finish, wait)

    def _finish(self, wait: Callable[[], None]) -> None:
        self._started.remove(wait)
        wait()

    def _finish_all(self) -> None:
        """Leave nothing in flight: after an error the next user of the buffers would write what is being copied."""
        while self._started:
            self._started.pop(0)()
        if self._sent:
            self._provider.submit(())


def _size(content: Content) -> int:
    """Bytes of a buffer for it."""
    if isinstance(content, int):
        return max(4, content)
    return lowering.row_bytes(content) if isinstance(content, Tensor) else max(4, content.nbytes)
