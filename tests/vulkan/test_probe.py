from __future__ import annotations

import pytest
from bare_process import process

from aat_hf.vulkan import loader, probe
from aat_hf.vulkan.errors import VulkanUnavailableError

REPORT = "from aat_hf.vulkan.probe import probe; print(probe())"


@pytest.mark.vulkan
def test_agrees_with_the_binding(device):
    vk = pytest.importorskip("vulkan")
    application = vk.VkApplicationInfo(apiVersion=vk.VK_MAKE_VERSION(1, 1, 0))
    instance = vk.vkCreateInstance(vk.VkInstanceCreateInfo(pApplicationInfo=application), None)
    physical = vk.vkEnumeratePhysicalDevices(instance)[device.index]
    properties = vk.vkGetPhysicalDeviceProperties(physical)
    limits = properties.limits
    assert device.name == properties.deviceName
    assert probe.KINDS[properties.deviceType] == device.kind
    assert (device.driver, device.vendor_id, device.device_id) == (
        properties.driverVersion, properties.vendorID, properties.deviceID,
    )  # fmt: skip
    assert device.max_storage_bytes == limits.maxStorageBufferRange
    assert device.max_push_bytes == limits.maxPushConstantsSize
    assert device.max_buffers == limits.maxPerStageDescriptorStorageBuffers
    assert device.max_shared_bytes == limits.maxComputeSharedMemorySize
    assert device.max_groups == tuple(limits.maxComputeWorkGroupCount)
    assert device.max_local == tuple(limits.maxComputeWorkGroupSize)
    assert device.max_invocations == limits.maxComputeWorkGroupInvocations
    memory = vk.vkGetPhysicalDeviceMemoryProperties(physical)
    assert device.heap_bytes in [memory.memoryHeaps[heap].size for heap in range(memory.memoryHeapCount)]
    assert "basic" in device.subgroup_operations and device.subgroup_size & (device.subgroup_size - 1) == 0
    vk.vkDestroyInstance(instance, None)


@pytest.mark.vulkan
def test_without_a_driver_there_is_a_reason(device):
    done = process(REPORT, VK_ICD_FILENAMES="/nowhere.json", VK_DRIVER_FILES="/nowhere.json")
    assert done.returncode == 0 and "devices=()" in done.stdout
    assert "driver" in done.stdout and probe.DRIVER_REMEDY in done.stdout


def test_without_a_loader_there_is_a_reason(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "_NAMES", dict.fromkeys(("linux", "darwin", "win32"), ("libnowhere.so",)))
    loader.library.cache_clear()
    with pytest.raises(VulkanUnavailableError, match="no Vulkan loader"):
        loader.library()
    assert probe.probe.__wrapped__() == ((), "no Vulkan loader (libvulkan) is installed", probe.LOADER_REMEDY)
    loader.library.cache_clear()
