"""Look at the Vulkan devices without a binding; nothing here aborts or raises for want of one."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

from aat_hf.vulkan import loader
from aat_hf.vulkan.errors import VulkanUnavailableError
from aat_hf.vulkan.interface import DeviceInfo

KINDS = ("other", "integrated", "discrete", "virtual", "cpu")  # VkPhysicalDeviceType
DRIVER_REMEDY = "install a Vulkan driver: your GPU vendor's, or Mesa's (apt-get install mesa-vulkan-drivers)"
LOADER_REMEDY = "install the Vulkan loader: apt-get install libvulkan1, or your GPU vendor's driver"
_OPERATIONS = ("basic", "vote", "arithmetic", "ballot", "shuffle", "shuffle_relative", "clustered", "quad")
_COMPUTE_STAGE, _DEVICE_LOCAL = 0x20, 1
_PROPERTIES_2, _SUBGROUP_PROPERTIES = 1000059001, 1000094000  # VkStructureType


class Probe(NamedTuple):
    """What was found.

    Attributes:
        devices: those with Vulkan 1.1 or later, in the loader's order.
        reason: why there is none, empty when there is one; remedy: the line that mends it.
    """

    devices: tuple[DeviceInfo, ...]
    reason: str = ""
    remedy: str = ""


@lru_cache(maxsize=1)
def probe() -> Probe:
    """The devices of this machine; looked up once per process."""
    try:
        loader.library()
    except VulkanUnavailableError as error:
        return Probe((), str(error), LOADER_REMEDY)
    try:
        with loader.instance() as instance:
            found = [_describe(index, device) for index, device in enumerate(loader.physical_devices(instance))]
    except VulkanUnavailableError as error:
        return Probe((), f"no usable Vulkan driver ({error})", DRIVER_REMEDY)
    devices = tuple(device for device in found if device is not None)
    if devices:
        return Probe(devices)
    return Probe(
        (), "no driver has a device with Vulkan 1.1" if found else "no Vulkan driver has a device", DRIVER_REMEDY
    )


def _describe(index: int, device: loader.Handle) -> DeviceInfo | None:
    """The device, or None when it is older than Vulkan 1.1."""
    subgroup = loader.SubgroupProperties(_SUBGROUP_PROPERTIES)
    found = loader.Properties(_PROPERTIES_2, ctypes.cast(ctypes.pointer(subgroup), ctypes.c_void_p))
    plain = (ctypes.c_byte * ctypes.sizeof(loader.Properties))()
    loader.library().vkGetPhysicalDeviceProperties(device, plain)
    if loader.U32.from_buffer(plain).value < loader.VERSION_1_1:
        return None  # it does not know VkPhysicalDeviceProperties2
    loader.library().vkGetPhysicalDeviceProperties2(device, ctypes.byref(found))
    memory = loader.memory_properties(device)
    heaps = [heap.size for heap in memory.heaps[: memory.heap_count] if heap.flags & _DEVICE_LOCAL]
    limits, offered = found.limits, subgroup.operations if subgroup.stages & _COMPUTE_STAGE else 0
    return DeviceInfo(
        index=index,
        name=found.name.decode(errors="replace"),
        kind=KINDS[found.kind] if found.kind < len(KINDS) else "other",
        api_version=_version(found.api_version),
        driver=found.driver_version,
        vendor_id=found.vendor,
        device_id=found.device,
        heap_bytes=max(heaps, default=0),
        max_storage_bytes=limits.storage_range,
        max_invocations=limits.invocations,
        max_local=_triple(limits.local_size),
        max_shared_bytes=limits.shared_bytes,
        max_groups=_triple(limits.groups),
        max_push_bytes=limits.push_bytes,
        max_buffers=limits.stage_storage_buffers,
        subgroup_size=subgroup.size,
        subgroup_operations=frozenset(name for bit, name in enumerate(_OPERATIONS) if offered >> bit & 1),
    )


def _version(number: int) -> str:
    return f"{number >> 22 & 0x7F}.{number >> 12 & 0x3FF}.{number & 0xFFF}"


def _triple(values: ctypes.Array[ctypes.c_uint32]) -> tuple[int, int, int]:
    x, y, z = values
    return x, y, z
