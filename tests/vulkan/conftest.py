"""Providers for the tests; without a driver or binding they skip, unless AAT_REQUIRE_VULKAN is set: then they fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from absent import absent

from aat_hf.vulkan.guard import PACKAGES
from aat_hf.vulkan.interface import DeviceInfo, Provider
from aat_hf.vulkan.probe import probe
from aat_hf.vulkan.provider import installed, make


@pytest.fixture(scope="session")
def device() -> DeviceInfo:
    devices, reason, remedy = probe()
    if not devices:
        absent(f"{reason}: {remedy}")
    return devices[0]


@pytest.fixture(scope="session", params=list(PACKAGES))
def binding(request: pytest.FixtureRequest, device: DeviceInfo) -> str:
    if request.param not in installed():
        absent(f"the package {PACKAGES[request.param]} of provider {request.param} is not installed")
    return request.param


@pytest.fixture(scope="session", params=["unified", "copies"])
def provider(request: pytest.FixtureRequest, binding: str, device: DeviceInfo) -> Iterator[Provider]:
    """Both bindings, each also as on a device with its own memory."""
    kind = "cpu" if request.param == "unified" else "discrete"
    made = make(binding, dataclasses.replace(device, kind=kind))
    yield made
    made.close()
