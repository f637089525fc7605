"""A provider in host memory, which runs nothing."""

from __future__ import annotations

import numpy as np

from aat_hf.vulkan.errors import OutOfDeviceMemoryError
from aat_hf.vulkan.interface import DeviceInfo

DEVICE = DeviceInfo(
    index=0,
    name="fake",
    kind="cpu",
    api_version="1.1.0",
    driver=1,
    vendor_id=0,
    device_id=0,
    heap_bytes=1 << 20,
    max_storage_bytes=1 << 18,
    max_invocations=256,
    max_local=(256, 128, 64),
    max_shared_bytes=16384,
    max_groups=(1000, 100, 10),
    max_push_bytes=128,
    max_buffers=4,
    subgroup_size=32,
    subgroup_operations=frozenset({"basic"}),
)


class FakeBuffer:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = self.used = nbytes

    def view(self) -> np.ndarray:
        return np.zeros(self.nbytes, np.uint8)


class FakeProvider:
    """Memory of `room` bytes; what is held is in `held`."""

    def __init__(self, room: int) -> None:
        self.device, self.room, self.held = DEVICE, room, []

    def buffer(self, nbytes: int) -> FakeBuffer:
        if sum(buffer.nbytes for buffer in self.held) + nbytes > self.room:
            raise OutOfDeviceMemoryError("full")
        self.held.append(FakeBuffer(nbytes))
        return self.held[-1]

    def release(self, buffer: FakeBuffer) -> None:
        self.held.remove(buffer)
