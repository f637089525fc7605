"""What a Vulkan binding has to provide: buffers of a device, and dispatches of shaders over them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.pipelines import CacheStatistics

SHADERS = Path(__file__).with_name("shaders")


@dataclass(frozen=True)
class DeviceInfo:
    """A physical device as its driver describes it; sizes in bytes.

    Attributes:
        index: place in the loader's list; the same for every binding.
        kind: "discrete", "integrated", "virtual", "cpu" (a software driver) or "other".
        api_version, driver: of the device, like "1.3.230", and of its driver, an opaque number.
        heap_bytes: its largest device-local heap.
        max_storage_bytes: the longest range a shader can bind.
        max_invocations, max_local: of a workgroup, in all and along x, y, z.
        max_groups: workgroups of a dispatch along x, y, z.
        subgroup_size: invocations of a subgroup; subgroup_operations: "basic", "vote", "arithmetic", "ballot",
            "shuffle", "shuffle_relative", "clustered" and "quad", those that compute shaders may use.
    """

    index: int
    name: str
    kind: str
    api_version: str
    driver: int
    vendor_id: int
    device_id: int
    heap_bytes: int
    max_storage_bytes: int
    max_invocations: int
    max_local: tuple[int, int, int]
    max_shared_bytes: int
    max_groups: tuple[int, int, int]
    max_push_bytes: int
    max_buffers: int
    subgroup_size: int
    subgroup_operations: frozenset[str]

    @property
    def unified(self) -> bool:
        """Host and device share their memory: buffers need no copies."""
        return self.kind in ("cpu", "integrated")


class Buffer(Protocol):
    """Memory of the device that shaders read and write."""

    used: int  # bytes of it that matter at present: a binding that can copies no more

    @property
    def nbytes(self) -> int:
        """Its size, a multiple of 4."""

    def view(self) -> NDArray[np.uint8]:
        """Host memory (nbytes,): the device's own where memory is unified, else what uploads and downloads copy."""


@dataclass(frozen=True)
class Dispatch:
    """One run of a compute shader.

    Attributes:
        shader: the stem of a shader of this package, or the path of another `.spv` file.
        buffers: bound to set 0, bindings 0, 1, ...
        groups: workgroups along x, y, z.
        spec: specialisation constants 0, 1, ... and push: push constants, as 32-bit words (see `float_bits`).
    """

    shader: str
    buffers: tuple[Buffer, ...]
    groups: tuple[int, int, int]
    spec: tuple[int, ...] = ()
    push: tuple[int, ...] = ()


class Provider(Protocol):
    """A binding on one device, usable from any thread."""

    @property
    def name(self) -> str:
        """Of the binding: "kompute" or "vulkan"."""

    @property
    def device(self) -> DeviceInfo:
        """What it runs on."""

    @property
    def pipelines(self) -> CacheStatistics:
        """Hits and misses of its compiled shaders."""

    @property
    def overlaps(self) -> bool:
        """Whether `start` returns before the device is done."""

    @property
    def usable(self) -> bool:
        """Whether it was neither closed nor inherited from the process that forked this one."""

    def buffer(self, nbytes: int) -> Buffer:
        """Memory of `nbytes` (rounded up to words), contents undefined.

        Raises:
            VulkanLimitError: the size is not positive, or longer than a shader can bind.
            OutOfDeviceMemoryError: no room.
        """

    def release(self, buffer: Buffer) -> None:
        """Give the memory back; views that are still held stay readable."""

    def send(self, *buffers: Buffer) -> None:
        """Begin to copy to the device, while the host prepares more; the next submission sees the buffers whole.

        Until that is over their host memory has to stay as it is, and no earlier submission may use them. A binding
        that can only wait copies them then.
        """

    def submit(
        self, dispatches: Sequence[Dispatch], upload: Sequence[Buffer] = (), download: Sequence[Buffer] = ()
    ) -> None:
        """Copy `upload` to the device, run `dispatches` in order, copy `download` back; returns when all is done.

        Each dispatch sees what earlier ones wrote.

        Raises:
            VulkanLimitError: a dispatch asks for more than the device or the shader takes; nothing ran.
            VulkanError: the device failed.
        """

    def start(
        self, dispatches: Sequence[Dispatch], upload: Sequence[Buffer] = (), download: Sequence[Buffer] = ()
    ) -> Callable[[], None]:
        """`submit` that returns while the device works; what it returns waits, and has to be called once.

        Until then the buffers have to stay as they are. A binding that can only wait has done so before it returns.
        """

    def close(self) -> None:
        """Wait, then give everything back; the provider cannot be used afterwards."""


def float_bits(value: float) -> int:
    """The 32-bit word of a float32, for `Dispatch.spec` and `Dispatch.push`."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@lru_cache(maxsize=256)
def shader_code(shader: str) -> bytes:
    """SPIR-V of a shader of this package by its stem, or of the `.spv` file at a path."""
    path = Path(shader) if shader.endswith(".spv") else SHADERS / f"{shader}.spv"
    try:
        return path.read_bytes()
    except OSError as error:
        raise VulkanError(f"shader {shader!r}: cannot read {path} ({error}); reinstall aat-hf") from error
