"""A Vulkan device through the PyPI package `vulkan`: instance, queue, memory, pipelines.

The binding's structures keep what they point to only while they live themselves; those here are held in local names
until the call that reads them has returned.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import vulkan as vk
from numpy.typing import NDArray

from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanError, VulkanUnavailableError
from aat_hf.vulkan.interface import DeviceInfo, shader_code

_COHERENT = vk.VK_MEMORY_PROPERTY_HOST_VISIBLE_BIT | vk.VK_MEMORY_PROPERTY_HOST_COHERENT_BIT
_CACHED, _LOCAL = vk.VK_MEMORY_PROPERTY_HOST_CACHED_BIT, vk.VK_MEMORY_PROPERTY_DEVICE_LOCAL_BIT
# properties of memory by its use, best first
LOCAL = (_LOCAL, 0)
STAGING = (_COHERENT | _CACHED, _COHERENT)
UNIFIED = (_COHERENT | _CACHED | _LOCAL, _COHERENT | _LOCAL, _COHERENT)
_PORTABILITY, _SUBSET = "VK_KHR_portability_enumeration", "VK_KHR_portability_subset"
_ENUMERATE_PORTABILITY = 1


@contextmanager
def reported(doing: str) -> Iterator[None]:
    """Turn the binding's exceptions into ours."""
    try:
        yield
    except (vk.VkErrorOutOfDeviceMemory, vk.VkErrorOutOfHostMemory, vk.VkErrorTooManyObjects) as error:
        raise OutOfDeviceMemoryError(
            f"{doing}: the device is out of memory ({type(error).__name__}): use a shorter input, or the CPU"
        ) from error
    except vk.VkErrorDeviceLost as error:
        raise VulkanError(f"{doing}: the device was lost; its driver's log says why. Restart the process") from error
    except (vk.VkException, vk.VkError) as error:
        raise VulkanError(f"{doing} failed ({type(error).__name__} {error})") from error


@dataclass
class Memory:
    """A buffer; `mapped` (nbytes,) is its memory as the host sees it, (0,) where it does not.

    Its memory is freed when nothing holds this and no view of `mapped` is left.
    """

    handle: Any
    mapped: NDArray[np.uint8]


@dataclass(frozen=True)
class Pipeline:
    """A compiled shader with its layouts."""

    pipeline: Any
    layout: Any
    set_layout: Any


class Device:
    """One logical device with one compute queue.

    Attributes:
        handle: VkDevice; queue, queue_family: where work is submitted.
    """

    def __init__(self, info: DeviceInfo) -> None:
        with reported(f"opening {info.name}"):
            self._instance = _instance()
            physical = vk.vkEnumeratePhysicalDevices(self._instance)[info.index]
            if vk.vkGetPhysicalDeviceProperties(physical).deviceName != info.name:
                raise VulkanUnavailableError(f"device {info.index} is no longer {info.name}: start the process again")
            self.queue_family = _compute_family(physical)
            self.handle = _logical(physical, self.queue_family)
            self.queue = vk.vkGetDeviceQueue(self.handle, self.queue_family, 0)
            memory = vk.vkGetPhysicalDeviceMemoryProperties(physical)
        self._kinds = [kind.propertyFlags for kind in memory.memoryTypes[0 : memory.memoryTypeCount]]
        self._owned: dict[int, Callable[[], object]] = {}
        self._serials = itertools.count()
        self._process = os.getpid()

    def memory(self, nbytes: int, use: tuple[int, ...]) -> Memory:
        """A storage buffer with memory of its own.

        Args:
            use: LOCAL, STAGING or UNIFIED; the latter two are mapped.
        """
        usage = (
            vk.VK_BUFFER_USAGE_STORAGE_BUFFER_BIT
            | vk.VK_BUFFER_USAGE_TRANSFER_SRC_BIT
            | vk.VK_BUFFER_USAGE_TRANSFER_DST_BIT
        )
        with reported(f"allocating {nbytes} bytes"):
            buffer = vk.vkCreateBuffer(self.handle, vk.VkBufferCreateInfo(size=nbytes, usage=usage), None)
            allocation = None
            try:
                needs = vk.vkGetBufferMemoryRequirements(self.handle, buffer)
                kind = self._kind(needs.memoryTypeBits, use)
                request = vk.VkMemoryAllocateInfo(allocationSize=needs.size, memoryTypeIndex=kind)
                allocation = vk.vkAllocateMemory(self.handle, request, None)
                vk.vkBindBufferMemory(self.handle, buffer, allocation, 0)
                view = None if use is LOCAL else vk.vkMapMemory(self.handle, allocation, 0, nbytes, 0)
            except BaseException:
                self._free(buffer, allocation)
                raise
        memory = Memory(buffer, np.empty(0, np.uint8) if view is None else np.frombuffer(view, np.uint8))
        # views of the mapped array keep it, and it keeps the memory
        self._own(memory if view is None else memory.mapped, buffer, allocation)
        return memory

    def pipeline(self, shader: str, spec: Sequence[int], buffers: int, push_bytes: int) -> Pipeline:
        """Compile a shader for these specialisation constants."""
        code = shader_code(shader)
        bindings = [
            vk.VkDescriptorSetLayoutBinding(
                binding=place,
                descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                descriptorCount=1,
                stageFlags=vk.VK_SHADER_STAGE_COMPUTE_BIT,
            )
            for place in range(buffers)
        ]
        with reported(f"compiling shader {shader!r}"), ExitStack() as undo, ExitStack() as finish:
            described = vk.VkDescriptorSetLayoutCreateInfo(bindingCount=buffers, pBindings=bindings)
            set_layout = vk.vkCreateDescriptorSetLayout(self.handle, described, None)
            undo.callback(vk.vkDestroyDescriptorSetLayout, self.handle, set_layout, None)
            layout = self._layout(set_layout, push_bytes)
            undo.callback(vk.vkDestroyPipelineLayout, self.handle, layout, None)
            module_info = vk.VkShaderModuleCreateInfo(codeSize=len(code), pCode=code)
            module = vk.vkCreateShaderModule(self.handle, module_info, None)
            finish.callback(vk.vkDestroyShaderModule, self.handle, module, None)
            compiled = Pipeline(self._compile(module, layout, spec), layout, set_layout)
            undo.pop_all()  # it was made: nothing to undo
            return compiled

    def _layout(self, set_layout: Any, push_bytes: int) -> Any:
        stage = vk.VK_SHADER_STAGE_COMPUTE_BIT
        ranges = [vk.VkPushConstantRange(stageFlags=stage, offset=0, size=push_bytes)] if push_bytes else None
        layouts = [set_layout]
        described = vk.VkPipelineLayoutCreateInfo(
            setLayoutCount=1,
            pSetLayouts=layouts,
            pushConstantRangeCount=int(push_bytes > 0),
            pPushConstantRanges=ranges,
        )
        return vk.vkCreatePipelineLayout(self.handle, described, None)

    def _compile(self, module: Any, layout: Any, spec: Sequence[int]) -> Any:
        words = vk.ffi.new("uint32_t[]", list(spec) or [0])
        entries = [vk.VkSpecializationMapEntry(constantID=i, offset=4 * i, size=4) for i in range(len(spec))]
        constants = vk.VkSpecializationInfo(
            mapEntryCount=len(spec), pMapEntries=entries or None, dataSize=4 * len(spec), pData=words
        )
        entry_point = vk.ffi.new("char[]", b"main")
        stage = vk.VkPipelineShaderStageCreateInfo(
            stage=vk.VK_SHADER_STAGE_COMPUTE_BIT, module=module, pName=entry_point, pSpecializationInfo=constants
        )
        described = [vk.VkComputePipelineCreateInfo(stage=stage, layout=layout)]
        return vk.vkCreateComputePipelines(self.handle, vk.VK_NULL_HANDLE, 1, described, None)[0]

    def destroy_pipeline(self, pipeline: Pipeline) -> None:
        """Give a pipeline back."""
        vk.vkDestroyPipeline(self.handle, pipeline.pipeline, None)
        vk.vkDestroyPipelineLayout(self.handle, pipeline.layout, None)
        vk.vkDestroyDescriptorSetLayout(self.handle, pipeline.set_layout, None)

    def close(self) -> None:
        """Free all memory and the device; nothing may be in flight."""
        for free in list(self._owned.values()):
            free()
        vk.vkDestroyDevice(self.handle, None)
        vk.vkDestroyInstance(self._instance, None)

    def _kind(self, allowed: int, use: tuple[int, ...]) -> int:
        """The first memory type with the best properties that there are."""
        for wanted in use:
            for kind, flags in enumerate(self._kinds):
                if allowed >> kind & 1 and flags & wanted == wanted:
                    return kind
        raise VulkanError("the device has no memory that suits a storage buffer")

    def _own(self, owner: Any, buffer: Any, allocation: Any) -> None:
        """Free the memory with `owner`, or in `close`."""
        serial = next(self._serials)
        free = weakref.finalize(owner, self._free_owned, serial, buffer, allocation)
        free.atexit = False  # the provider closes the device at exit, or a forked process must not touch it
        self._owned[serial] = free

    def _free_owned(self, serial: int, buffer: Any, allocation: Any) -> None:
        del self._owned[serial]
        if self._process == os.getpid():
            self._free(buffer, allocation)

    def _free(self, buffer: Any, allocation: Any) -> None:
        vk.vkDestroyBuffer(self.handle, buffer, None)
        if allocation is not None:
            vk.vkFreeMemory(self.handle, allocation, None)


def _instance() -> Any:
    offered = {extension.extensionName for extension in vk.vkEnumerateInstanceExtensionProperties(None)}
    extensions = [_PORTABILITY] if _PORTABILITY in offered else []
    application = vk.VkApplicationInfo(
        pApplicationName="aat_hf", pEngineName="aat_hf", apiVersion=vk.VK_MAKE_VERSION(1, 1, 0)
    )
    described = vk.VkInstanceCreateInfo(
        flags=_ENUMERATE_PORTABILITY * len(extensions),
        pApplicationInfo=application,
        enabledExtensionCount=len(extensions),
        ppEnabledExtensionNames=extensions,
    )
    return vk.vkCreateInstance(described, None)


def _compute_family(physical: Any) -> int:
    for family, properties in enumerate(vk.vkGetPhysicalDeviceQueueFamilyProperties(physical)):
        if properties.queueFlags & vk.VK_QUEUE_COMPUTE_BIT:
            return family
    raise VulkanUnavailableError("the device has no queue that computes")


def _logical(physical: Any, family: int) -> Any:
    offered = {extension.extensionName for extension in vk.vkEnumerateDeviceExtensionProperties(physical, None)}
    extensions = [_SUBSET] if _SUBSET in offered else []  # has to be enabled where it is offered
    queues = [vk.VkDeviceQueueCreateInfo(queueFamilyIndex=family, queueCount=1, pQueuePriorities=[1.0])]
    described = vk.VkDeviceCreateInfo(
        queueCreateInfoCount=1,
        pQueueCreateInfos=queues,
        enabledExtensionCount=len(extensions),
        ppEnabledExtensionNames=extensions,
    )
    return vk.vkCreateDevice(physical, described, None)
