"""What can go wrong on a Vulkan device; every message names cause and remedy."""

from __future__ import annotations


class VulkanError(RuntimeError):
    """The device, its driver or its binding failed."""


class VulkanUnavailableError(VulkanError):
    """No device can be used here: no loader, driver or binding, or the driver failed its smoke test."""


class VulkanLimitError(VulkanError, ValueError):
    """A buffer, shader or dispatch is more than the device takes; nothing was sent to it."""


class OutOfDeviceMemoryError(VulkanError, MemoryError):
    """The device has no room for a buffer; what is on it stays valid, so the caller can compute elsewhere."""
