"""`get_provider`: the Vulkan device to compute on, through one of two bindings.

`kompute` (the `kp` package, built by `make vulkan`) and `vulkan` (the PyPI package of that name) run the same SPIR-V
and the same checks. `AAT_VULKAN_PROVIDER` and `AAT_VULKAN_DEVICE` choose; the smoke test of `guard` comes first.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import threading
from importlib.util import find_spec

from aat_hf.vulkan import guard
from aat_hf.vulkan.errors import VulkanUnavailableError
from aat_hf.vulkan.interface import Buffer, DeviceInfo, Dispatch, Provider, float_bits, shader_code
from aat_hf.vulkan.probe import probe

__all__ = ["Buffer", "DeviceInfo", "Dispatch", "Provider", "float_bits", "get_provider", "installed", "shader_code"]

logger = logging.getLogger(__name__)

_BEST = ("discrete", "integrated", "virtual", "other", "cpu")
INSTALL = {"kompute": "make vulkan (in a checkout, on Debian or Ubuntu)", "vulkan": 'pip install "aat-hf[vulkan]"'}
_lock = threading.Lock()
_providers: dict[tuple[str, int], Provider] = {}
_refused: set[tuple[str, int]] = set()  # told about
_found: set[str] = set()  # packages: looking for one reads the disk


def get_provider(name: str | None = None, device: int | None = None) -> Provider:
    """The provider of a device: one per process and device, made on first use and again after a fork.

    Args:
        name: "kompute" or "vulkan"; None: `AAT_VULKAN_PROVIDER`, else the first that is installed.
        device: its index; None: `AAT_VULKAN_DEVICE`, else the best kind: discrete, integrated, virtual, cpu.

    Raises:
        VulkanUnavailableError: no loader, driver, binding or such device, or the smoke test failed; says which.
    """
    names, info = _choose_bindings(name or os.environ.get("AAT_VULKAN_PROVIDER")), _choose_device(device)
    with _lock:
        for chosen in names:
            try:
                return _opened(chosen, info)
            except VulkanUnavailableError as error:
                if chosen == names[-1]:
                    raise
                if (chosen, info.index) not in _refused:
                    _refused.add((chosen, info.index))
                    logger.warning("%s; trying provider %r", error, names[names.index(chosen) + 1])
    raise AssertionError("names is never empty")


def _opened(name: str, info: DeviceInfo) -> Provider:
    provider = _providers.get((name, info.index))
    if provider is None or not provider.usable:
        guard.check(name, info)
        provider = make(name, info)
        atexit.register(provider.close)  # after the binding's own hooks are registered, so it runs before them
        _providers[name, info.index] = provider
    return provider


def installed() -> list[str]:
    """The providers whose package is there, best first."""
    return [name for name, package in guard.PACKAGES.items() if _is_there(package)]


def _is_there(package: str) -> bool:
    if package not in _found and (spec := find_spec(package)) is not None and spec.origin:  # a mere folder has none
        _found.add(package)
    return package in _found


def make(name: str, device: DeviceInfo) -> Provider:
    """A new provider, without a smoke test; `get_provider` is for everyone else."""
    if name == "kompute":
        from aat_hf.vulkan.kompute import KomputeProvider

        return KomputeProvider(device)
    from aat_hf.vulkan.cffi_provider import VulkanProvider

    return VulkanProvider(device)


def _choose_bindings(name: str | None) -> list[str]:
    if name is not None and name not in guard.PACKAGES:
        raise VulkanUnavailableError(f"no Vulkan provider is called {name!r}; there are {', '.join(guard.PACKAGES)}")
    found = installed()
    if name is None and not found:
        raise VulkanUnavailableError(f"no Python binding of Vulkan is installed: {INSTALL['vulkan']}")
    if name is not None and name not in found:
        package = guard.PACKAGES[name]
        raise VulkanUnavailableError(f"the package {package} of provider {name!r} is not installed: {INSTALL[name]}")
    return [name] if name else found


def _choose_device(index: int | None) -> DeviceInfo:
    devices, reason, remedy = probe()
    if not devices:
        raise VulkanUnavailableError(f"{reason}: {remedy}")
    if index is None and (named := os.environ.get("AAT_VULKAN_DEVICE")):
        if not named.isdecimal():
            raise VulkanUnavailableError(f"AAT_VULKAN_DEVICE={named!r} is no index of a device, like 0")
        index = int(named)
    if index is None:
        return min(devices, key=lambda device: (_BEST.index(device.kind), device.index))
    for device in devices:
        if device.index == index:
            return device
    there = ", ".join(f"{device.index}: {device.name}" for device in devices)
    raise VulkanUnavailableError(f"there is no Vulkan device {index}; there are {there}")


def _abandon() -> None:
    """After a fork: the parent's devices must neither be used nor destroyed here; both may hang."""
    global _lock
    _lock = threading.Lock()
    for provider in _providers.values():
        atexit.unregister(provider.close)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(provider))
    _providers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon)
