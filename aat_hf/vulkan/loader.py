"""The Vulkan loader through ctypes, as far as a look at the devices and a trial allocation need it.

A binding may abort the process where there is no driver; ctypes gets an error code. Structures and constants are
those of `vulkan_core.h`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from aat_hf.vulkan.errors import VulkanUnavailableError

Handle = ctypes.c_void_p
U32, U64 = ctypes.c_uint32, ctypes.c_uint64
VERSION_1_1 = 1 << 22 | 1 << 12
_PORTABILITY, _ENUMERATE_PORTABILITY = b"VK_KHR_portability_enumeration", 1
_NAMES = {
    "linux": ("libvulkan.so.1", "libvulkan.so"),
    "darwin": ("libvulkan.1.dylib", "libvulkan.dylib", "/usr/local/lib/libvulkan.1.dylib"),
    "win32": ("vulkan-1.dll",),
}


_HEAD = (("type", U32), ("next", ctypes.c_void_p))  # of most structures


class ApplicationInfo(ctypes.Structure):
    """VkApplicationInfo."""

    _fields_ = (
        *_HEAD,
        ("application", ctypes.c_char_p),
        ("application_version", U32),
        ("engine", ctypes.c_char_p),
        ("engine_version", U32),
        ("api_version", U32),
    )


class InstanceCreateInfo(ctypes.Structure):
    """VkInstanceCreateInfo."""

    _fields_ = (
        *_HEAD,
        ("flags", U32),
        ("application", ctypes.POINTER(ApplicationInfo)),
        ("layer_count", U32),
        ("layers", ctypes.c_void_p),
        ("extension_count", U32),
        ("extensions", ctypes.POINTER(ctypes.c_char_p)),
    )


class ExtensionProperties(ctypes.Structure):
    """VkExtensionProperties."""

    _fields_ = (("name", ctypes.c_char * 256), ("version", U32))


class Limits(ctypes.Structure):
    """VkPhysicalDeviceLimits: 504 bytes, of which the limits of compute shaders are named."""

    _fields_ = (
        ("_images", U32 * 7),
        ("storage_range", U32),
        ("push_bytes", U32),
        ("allocations", U32),
        ("_samplers", U32),
        ("_pages", U64 * 2),
        ("_bound_sets", U32 * 3),
        ("stage_storage_buffers", U32),
        ("_sets", U32 * 34),
        ("shared_bytes", U32),
        ("groups", U32 * 3),
        ("invocations", U32),
        ("local_size", U32 * 3),
        ("_graphics", ctypes.c_byte * 256),
    )


class Properties(ctypes.Structure):
    """VkPhysicalDeviceProperties2."""

    _fields_ = (
        *_HEAD,
        ("api_version", U32),
        ("driver_version", U32),
        ("vendor", U32),
        ("device", U32),
        ("kind", U32),
        ("name", ctypes.c_char * 256),
        ("uuid", ctypes.c_byte * 16),
        ("limits", Limits),
        ("_sparse", U32 * 5),
    )


class SubgroupProperties(ctypes.Structure):
    """VkPhysicalDeviceSubgroupProperties."""

    _fields_ = (*_HEAD, ("size", U32), ("stages", U32), ("operations", U32), ("quad_in_all_stages", U32))


class MemoryType(ctypes.Structure):
    """VkMemoryType."""

    _fields_ = (("flags", U32), ("heap", U32))


class MemoryHeap(ctypes.Structure):
    """VkMemoryHeap."""

    _fields_ = (("size", U64), ("flags", U32))


class MemoryProperties(ctypes.Structure):
    """VkPhysicalDeviceMemoryProperties."""

    _fields_ = (("type_count", U32), ("types", MemoryType * 32), ("heap_count", U32), ("heaps", MemoryHeap * 16))


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loader.

    Raises:
        VulkanUnavailableError: it is not installed, or older than Vulkan 1.1.
    """
    for name in _NAMES.get(sys.platform, _NAMES["linux"]):
        try:
            vk = ctypes.CDLL(name)
        except OSError:
            continue
        if not hasattr(vk, "vkEnumerateInstanceVersion"):
            raise VulkanUnavailableError(f"the Vulkan loader {name} is older than Vulkan 1.1: update your GPU driver")
        return vk
    raise VulkanUnavailableError("no Vulkan loader (libvulkan) is installed")


def call(function: str, *arguments: Any) -> None:
    """Call a function of the loader that returns a VkResult.

    Raises:
        VulkanUnavailableError: it returned an error.
    """
    code = getattr(library(), function)(*arguments)
    if code < 0:
        raise VulkanUnavailableError(f"{function} failed with VkResult {code}")


def listed(function: str, of: type[Any], *head: Any) -> list[Any]:
    """The array that a function gives in two calls, count and contents."""
    count = U32()
    call(function, *head, ctypes.byref(count), None)
    array = (of * count.value)()
    call(function, *head, ctypes.byref(count), array)
    return list(array)[: count.value]


@contextmanager
def instance() -> Iterator[Handle]:
    """A Vulkan 1.1 instance that sees all devices, MoltenVK's too."""
    names = [
        extension.name for extension in listed("vkEnumerateInstanceExtensionProperties", ExtensionProperties, None)
    ]
    portable = _PORTABILITY in names
    extensions = (ctypes.c_char_p * 1)(_PORTABILITY)
    application = ApplicationInfo(0, None, b"aat_hf", 0, b"aat_hf", 0, VERSION_1_1)
    create = InstanceCreateInfo(
        1, None, _ENUMERATE_PORTABILITY * portable, ctypes.pointer(application), 0, None, int(portable), extensions
    )
    made = Handle()
    call("vkCreateInstance", ctypes.byref(create), None, ctypes.byref(made))
    try:
        yield made
    finally:
        library().vkDestroyInstance(made, None)


def physical_devices(of: Handle) -> list[Handle]:
    """All devices of an instance, in the loader's order."""
    return [Handle(device) for device in listed("vkEnumeratePhysicalDevices", Handle, of)]


def memory_properties(device: Handle) -> MemoryProperties:
    """Heaps and memory types."""
    memory = MemoryProperties()
    library().vkGetPhysicalDeviceMemoryProperties(device, ctypes.byref(memory))
    return memory
