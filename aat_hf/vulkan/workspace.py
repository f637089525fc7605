"""The buffers of one operation: taken from the provider's pool, filled, read, given back."""

from __future__ import annotations

import threading
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.vulkan import lowering
from aat_hf.vulkan.buffers import BufferPool
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider

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
    """Buffers that live as long as the `with` block.

    What `rows`, `words` and `zeros` made is uploaded with the next `run`; what `run` is told to fetch is downloaded.
    """

    def __init__(self, provider: Provider) -> None:
        self._provider, self._pool = provider, pool_of(provider)
        self._owned: list[Buffer] = []
        self._fresh: list[Buffer] = []

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for buffer in reversed(self._owned):  # the next call gets the same buffers for the same roles
            self._pool.recycle(buffer)

    def empty(self, nbytes: int, *, exact: bool = True) -> Buffer:
        """A buffer that a shader will fill; `exact`: of a size that recurs from call to call."""
        buffer = self._pool.acquire(max(4, nbytes), exact=exact)
        self._owned.append(buffer)
        return buffer

    def rows(self, x: Tensor) -> Buffer:
        """`x` (..., dim) with rows padded to whole vectors, in its own dtype."""
        buffer = self.empty(lowering.row_bytes(x))
        lowering.write_rows(buffer, x)
        self._fresh.append(buffer)
        return buffer

    def words(self, words: NDArray[np.generic]) -> Buffer:
        """Numbers of 32 bits, as many as it takes: a map has other tiles every time."""
        buffer = self.empty(words.nbytes, exact=False)
        lowering.write_words(buffer, words)
        self._fresh.append(buffer)
        return buffer

    def result(self, shape: torch.Size | tuple[int, ...]) -> Buffer:
        """Room for float32 rows of `shape` (..., dim)."""
        return self.empty(lowering.row_bytes(torch.empty(shape, dtype=torch.float32, device="meta")))

    def run(self, *dispatches: Dispatch, fetch: tuple[Buffer, ...] = ()) -> None:
        """Upload what is new, run, download `fetch`."""
        fresh, self._fresh = self._fresh, []
        self._provider.submit(dispatches, upload=fresh, download=fetch)
