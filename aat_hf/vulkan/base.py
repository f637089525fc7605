"""What both providers do alike: sizes, limits, ownership, one submission at a time, refusal after a fork."""

from __future__ import annotations

import itertools
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from aat_hf.vulkan import limits
from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.interface import Buffer, DeviceInfo, Dispatch
from aat_hf.vulkan.pipelines import CacheStatistics

_serials = itertools.count()


class HostBuffer:
    """A buffer of either provider.

    Attributes:
        nbytes: its size; used: bytes of it that matter at present.
        serial: tells it from every other buffer of the process, released ones too.
    """

    def __init__(self, nbytes: int, mapped: NDArray[np.uint8]) -> None:
        self.nbytes = self.used = nbytes
        self.serial = next(_serials)
        self._mapped: NDArray[np.uint8] | None = mapped

    def view(self) -> NDArray[np.uint8]:
        """Host memory (nbytes,), see `interface.Buffer`."""
        if self._mapped is None:
            raise VulkanError("this buffer was released: ask the provider for another")
        return self._mapped[: self.nbytes]

    def drop(self) -> None:
        """Forget the memory, which lives on until its last view is gone."""
        self._mapped = None


Owned = TypeVar("Owned", bound=HostBuffer)


class BaseProvider(ABC, Generic[Owned]):
    """A `Provider` but for `_allocate`, `_free`, `_send`, `_start` and `_shut`, which subclasses do under its lock."""

    name: ClassVar[str]
    overlaps: ClassVar[bool]

    def __init__(self, device: DeviceInfo) -> None:
        self.device = device
        self._owned: dict[int, Owned] = {}  # by serial
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._open = True

    @property
    @abstractmethod
    def pipelines(self) -> CacheStatistics:
        """Hits and misses of its compiled shaders."""

    @property
    def usable(self) -> bool:
        """Whether it is open, and of this process."""
        return self._open and self._process == os.getpid()

    def buffer(self, nbytes: int) -> Owned:
        """See `Provider.buffer`."""
        size = limits.check_size(nbytes, self.device)
        self._check_usable()
        with self._lock:
            buffer = self._allocate(size)
            self._owned[buffer.serial] = buffer
            return buffer

    def release(self, buffer: Buffer) -> None:
        """See `Provider.release`; nothing to do after `close` and in a forked process."""
        if not self.usable:
            return
        with self._lock:
            (own,) = self._own([buffer])
            del self._owned[own.serial]
            self._free(own)
            own.drop()

    def send(self, *buffers: Buffer) -> None:
        """See `Provider.send`."""
        self._check_usable()
        with self._lock:
            self._send(self._own(buffers))

    def submit(
        self, dispatches: Sequence[Dispatch], upload: Sequence[Buffer] = (), download: Sequence[Buffer] = ()
    ) -> None:
        """See `Provider.submit`."""
        self.start(dispatches, upload, download)()

    def start(
        self, dispatches: Sequence[Dispatch], upload: Sequence[Buffer] = (), download: Sequence[Buffer] = ()
    ) -> Callable[[], None]:
        """See `Provider.start`."""
        for dispatch in dispatches:
            limits.check_dispatch(dispatch, self.device)
        self._check_usable()
        with self._lock:
            self._check_usable()  # another thread may have closed it
            for dispatch in dispatches:
                self._own(dispatch.buffers)
            return self._start(limits.batches(dispatches), self._own(upload), self._own(download))

    def close(self) -> None:
        """See `Provider.close`."""
        if not self.usable:
            return
        with self._lock:
            self._open = False
            owned, self._owned = list(self._owned.values()), {}
            for buffer in owned:
                buffer.drop()
            self._shut(owned)

    def _own(self, buffers: Iterable[Buffer]) -> list[Owned]:
        """The buffers, each once, as this provider's own."""
        found = {}
        for buffer in buffers:
            own = self._owned.get(getattr(buffer, "serial", -1))
            if own is None:
                raise VulkanError("a buffer was released, or belongs to another provider")
            found[own.serial] = own
        return list(found.values())

    def _check_usable(self) -> None:
        if self._process != os.getpid():
            raise VulkanError("a device does not outlive a fork: call get_provider again in this process")
        if not self._open:
            raise VulkanError("this provider was closed: call get_provider again")

    @abstractmethod
    def _allocate(self, nbytes: int) -> Owned: ...

    @abstractmethod
    def _free(self, buffer: Owned) -> None: ...

    @abstractmethod
    def _send(self, buffers: list[Owned]) -> None: ...

    @abstractmethod
    def _start(
        self, batches: list[list[Dispatch]], upload: list[Owned], download: list[Owned]
    ) -> Callable[[], None]: ...

    @abstractmethod
    def _shut(self, buffers: list[Owned]) -> None: ...
