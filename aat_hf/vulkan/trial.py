"""Ask the driver for memory before a binding does that cannot report a refusal.

`kompute` ignores the results of the functions that allocate, and crashes on the memory it did not get. A trial takes
the same memory through ctypes, on a device of its own, and gives it back at once.
"""

from __future__ import annotations

import ctypes

from aat_hf.vulkan import loader
from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanUnavailableError
from aat_hf.vulkan.interface import DeviceInfo

DEVICE_LOCAL, HOST_COHERENT = 1, 2 | 4  # VkMemoryPropertyFlagBits
_QUEUE_INFO, _DEVICE_INFO, _ALLOCATE_INFO = 2, 3, 5  # VkStructureType


class _QueueInfo(ctypes.Structure):
    _fields_ = (
        ("type", loader.U32),
        ("next", ctypes.c_void_p),
        ("flags", loader.U32),
        ("family", loader.U32),
        ("count", loader.U32),
        ("priorities", ctypes.POINTER(ctypes.c_float)),
    )


class _DeviceInfo(ctypes.Structure):
    _fields_ = (
        ("type", loader.U32),
        ("next", ctypes.c_void_p),
        ("flags", loader.U32),
        ("queue_count", loader.U32),
        ("queues", ctypes.POINTER(_QueueInfo)),
        ("layer_count", loader.U32),
        ("layers", ctypes.c_void_p),
        ("extension_count", loader.U32),
        ("extensions", ctypes.c_void_p),
        ("features", ctypes.c_void_p),
    )


class _AllocateInfo(ctypes.Structure):
    _fields_ = (("type", loader.U32), ("next", ctypes.c_void_p), ("size", loader.U64), ("kind", loader.U32))


class TrialDevice:
    """A device that only allocates; `close` gives it back."""

    def __init__(self, info: DeviceInfo) -> None:
        self._info = info
        self._context = loader.instance()
        physical = loader.physical_devices(self._context.__enter__())[info.index]
        memory = loader.memory_properties(physical)
        self._kinds = [kind.flags for kind in memory.types[: memory.type_count]]
        queue = _QueueInfo(_QUEUE_INFO, None, 0, 0, 1, ctypes.pointer(ctypes.c_float(1.0)))
        described = _DeviceInfo(_DEVICE_INFO, None, 0, 1, ctypes.pointer(queue), 0, None, 0, None, None)
        self._device = loader.Handle()
        loader.call("vkCreateDevice", physical, ctypes.byref(described), None, ctypes.byref(self._device))

    def check(self, *requests: tuple[int, int]) -> None:
        """Allocate all of (bytes, properties) at once, then free them.

        Raises:
            OutOfDeviceMemoryError: the driver refused one.
        """
        taken = []
        try:
            for nbytes, properties in requests:
                described = _AllocateInfo(_ALLOCATE_INFO, None, nbytes, self._kind(properties))
                memory = loader.Handle()
                loader.call("vkAllocateMemory", self._device, ctypes.byref(described), None, ctypes.byref(memory))
                taken.append(memory)
        except VulkanUnavailableError as error:
            total = sum(nbytes for nbytes, _ in requests)
            raise OutOfDeviceMemoryError(
                f"{self._info.name} has no room for a buffer of {total} bytes: use a shorter input, or the CPU"
            ) from error
        finally:
            for memory in taken:
                loader.library().vkFreeMemory(self._device, memory, None)

    def close(self) -> None:
        """Give the device back."""
        loader.library().vkDestroyDevice(self._device, None)
        self._context.__exit__(None, None, None)

    def _kind(self, properties: int) -> int:
        """The memory type that `kompute` takes: the first with these properties."""
        return next(kind for kind, flags in enumerate(self._kinds) if flags & properties == properties)
