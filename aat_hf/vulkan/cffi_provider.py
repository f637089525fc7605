"""The provider over the PyPI package `vulkan`: every barrier recorded, every VkResult an exception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import vulkan as vk
from numpy.typing import NDArray

from aat_hf.vulkan import spirv
from aat_hf.vulkan.base import BaseProvider, HostBuffer
from aat_hf.vulkan.cffi_device import LOCAL, STAGING, UNIFIED, Device, Pipeline, reported
from aat_hf.vulkan.interface import DeviceInfo, Dispatch
from aat_hf.vulkan.pipelines import CacheStatistics, PipelineCache

_PIPELINES = 128
_FOREVER = 2**64 - 1
# (stages, accesses) of the two sides of a barrier
_HOST = (vk.VK_PIPELINE_STAGE_HOST_BIT, vk.VK_ACCESS_HOST_READ_BIT | vk.VK_ACCESS_HOST_WRITE_BIT)
_TRANSFER = (vk.VK_PIPELINE_STAGE_TRANSFER_BIT, vk.VK_ACCESS_TRANSFER_READ_BIT | vk.VK_ACCESS_TRANSFER_WRITE_BIT)
_COMPUTE = (vk.VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT, vk.VK_ACCESS_SHADER_READ_BIT | vk.VK_ACCESS_SHADER_WRITE_BIT)
_DEVICE = (_TRANSFER[0] | _COMPUTE[0], _TRANSFER[1] | _COMPUTE[1])
_ONCE = vk.VkCommandBufferBeginInfo(flags=vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT)


class _Key(NamedTuple):
    shader: str
    spec: tuple[int, ...]
    buffers: int


class _Commands(NamedTuple):
    """A command buffer, and what submits it: the binding takes tens of microseconds to make such a structure."""

    handle: Any
    submission: list[Any]


class VulkanBuffer(HostBuffer):
    """A storage buffer, and where memory is not unified its copy on the host."""

    def __init__(self, nbytes: int, mapped: NDArray[np.uint8], main: Any, staging: Any | None) -> None:
        super().__init__(nbytes, mapped)
        self.main, self.staging = main, staging


class VulkanProvider(BaseProvider[VulkanBuffer]):
    """See `Provider`; no optional feature of the device is enabled, and no shader that needs one accepted."""

    name: ClassVar[str] = "vulkan"

    def __init__(self, device: DeviceInfo) -> None:
        super().__init__(device)
        self._device = Device(device)
        self._cache: PipelineCache[_Key, Pipeline] = PipelineCache(_PIPELINES, self._compile, self._retire)
        self._retired: list[Pipeline] = []  # no longer cached, but maybe recorded
        with reported(f"opening {device.name}"):
            pool = vk.VkCommandPoolCreateInfo(queueFamilyIndex=self._device.queue_family)
            self._pool, self._copies = (vk.vkCreateCommandPool(self._device.handle, pool, None) for _ in range(2))
            self._commands = self._command_buffer(self._pool)
            self._idle: list[_Commands] = []  # of `_copies`
            self._sending: list[_Commands] = []  # those that the device may be executing
            self._fence = vk.vkCreateFence(self._device.handle, vk.VkFenceCreateInfo(), None)

    @property
    def pipelines(self) -> CacheStatistics:
        """Hits and misses of its compiled shaders."""
        return self._cache.statistics

    def _allocate(self, nbytes: int) -> VulkanBuffer:
        if self.device.unified:
            main = self._device.memory(nbytes, UNIFIED)
            return VulkanBuffer(nbytes, main.mapped, main, None)
        main, staging = self._device.memory(nbytes, LOCAL), self._device.memory(nbytes, STAGING)
        return VulkanBuffer(nbytes, staging.mapped, main, staging)

    def _free(self, buffer: VulkanBuffer) -> None:
        if self._sending:
            with reported(f"waiting for {self.device.name}"):
                vk.vkQueueWaitIdle(self._device.queue)
        buffer.main = buffer.staging = None

    def _compile(self, key: _Key) -> Pipeline:
        return self._device.pipeline(*key, spirv.load(key.shader).push_bytes)

    def _retire(self, pipeline: Pipeline) -> None:
        self._retired.append(pipeline)

    def _destroy_retired(self) -> None:
        while self._retired:
            self._device.destroy_pipeline(self._retired.pop())

    def _send(self, buffer: VulkanBuffer) -> None:
        if buffer.staging is None:
            return
        with reported(f"copying to {self.device.name}"):
            commands = self._idle.pop() if self._idle else self._command_buffer(self._copies)
            self._begin(commands.handle)
            self._copy(commands.handle, buffer.staging, buffer.main, buffer.used)
            vk.vkEndCommandBuffer(commands.handle)
            vk.vkQueueSubmit(self._device.queue, 1, commands.submission, vk.VK_NULL_HANDLE)
            self._sending.append(commands)

    def _run(
        self,
        batches: list[list[Dispatch]],
        upload: list[VulkanBuffer],
        download: list[VulkanBuffer],
        meanwhile: Callable[[], object],
    ) -> None:
        with reported(f"computing on {self.device.name}"):
            descriptors = self._descriptor_pool(batches)
            try:
                self._record(batches, upload, download, descriptors)
                self._execute(meanwhile)
            finally:
                vk.vkDestroyDescriptorPool(self._device.handle, descriptors, None)
                self._destroy_retired()

    def _record(
        self, batches: list[list[Dispatch]], upload: list[VulkanBuffer], download: list[VulkanBuffer], descriptors: Any
    ) -> None:
        vk.vkResetCommandPool(self._device.handle, self._pool, 0)
        commands = self._commands.handle
        self._begin(commands)
        for buffer in upload:
            self._copy(commands, buffer.staging, buffer.main, buffer.used)
        self._barrier(commands, _TRANSFER, _DEVICE)
        for batch in batches:
            for dispatch in batch:
                self._dispatch(commands, dispatch, descriptors)
            self._barrier(commands, _COMPUTE, _DEVICE)
        for buffer in download:
            self._copy(commands, buffer.main, buffer.staging, buffer.used)
        self._barrier(commands, _DEVICE, _HOST)
        vk.vkEndCommandBuffer(commands)

    def _execute(self, meanwhile: Callable[[], object]) -> None:
        vk.vkQueueSubmit(self._device.queue, 1, self._commands.submission, self._fence)
        try:
            meanwhile()
        finally:
            vk.vkWaitForFences(self._device.handle, 1, [self._fence], vk.VK_TRUE, _FOREVER)
            vk.vkResetFences(self._device.handle, 1, [self._fence])
        if self._sending:  # earlier submissions: the fence told of them too
            vk.vkResetCommandPool(self._device.handle, self._copies, 0)
            self._idle += self._sending
            self._sending.clear()

    def _command_buffer(self, pool: Any) -> _Commands:
        described = vk.VkCommandBufferAllocateInfo(
            commandPool=pool, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
        )
        handle = vk.vkAllocateCommandBuffers(self._device.handle, described)[0]
        return _Commands(handle, [vk.VkSubmitInfo(pCommandBuffers=[handle])])

    def _begin(self, commands: Any) -> None:
        vk.vkBeginCommandBuffer(commands, _ONCE)
        self._barrier(commands, _DEVICE, _DEVICE)  # what earlier submissions wrote becomes visible

    def _barrier(self, commands: Any, before: tuple[int, int], after: tuple[int, int]) -> None:
        memory = _memory_barrier(before[1], after[1])
        vk.vkCmdPipelineBarrier(commands, before[0], after[0], 0, 1, memory, 0, None, 0, None)

    def _copy(self, commands: Any, source: Any, target: Any, nbytes: int) -> None:
        if source is not None and target is not None:  # unified memory needs no copy
            vk.vkCmdCopyBuffer(commands, source.handle, target.handle, 1, [vk.VkBufferCopy(0, 0, nbytes)])

    def _dispatch(self, commands: Any, dispatch: Dispatch, descriptors: Any) -> None:
        pipeline = self._cache.get(_Key(dispatch.shader, dispatch.spec, len(dispatch.buffers)))
        buffers: Sequence[Any] = dispatch.buffers
        bound = self._bind(pipeline, buffers, descriptors)
        point = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        vk.vkCmdBindPipeline(commands, point, pipeline.pipeline)
        vk.vkCmdBindDescriptorSets(commands, point, pipeline.layout, 0, 1, [bound], 0, None)
        if dispatch.push:
            words = vk.ffi.new("uint32_t[]", list(dispatch.push))
            size, stage = 4 * len(dispatch.push), vk.VK_SHADER_STAGE_COMPUTE_BIT
            vk.vkCmdPushConstants(commands, pipeline.layout, stage, 0, size, words)
        vk.vkCmdDispatch(commands, *dispatch.groups)

    def _bind(self, pipeline: Pipeline, buffers: Sequence[VulkanBuffer], descriptors: Any) -> Any:
        """A descriptor set with the buffers at bindings 0, 1, ..."""
        layouts = [pipeline.set_layout]
        described = vk.VkDescriptorSetAllocateInfo(descriptorPool=descriptors, pSetLayouts=layouts)
        bound = vk.vkAllocateDescriptorSets(self._device.handle, described)[0]
        whole = [vk.VkDescriptorBufferInfo(buffer.main.handle, 0, buffer.nbytes) for buffer in buffers]
        write = vk.VkWriteDescriptorSet(  # binding 0 and, as it has room for one buffer, those that follow
            dstSet=bound,
            dstBinding=0,
            descriptorCount=len(whole),
            descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
            pBufferInfo=whole,
        )
        vk.vkUpdateDescriptorSets(self._device.handle, 1, [write], 0, None)
        return bound

    def _descriptor_pool(self, batches: list[list[Dispatch]]) -> Any:
        counts = [len(dispatch.buffers) for batch in batches for dispatch in batch] or [1]
        kind = vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER
        sizes = [vk.VkDescriptorPoolSize(type=kind, descriptorCount=sum(counts))]
        described = vk.VkDescriptorPoolCreateInfo(maxSets=len(counts), pPoolSizes=sizes)
        return vk.vkCreateDescriptorPool(self._device.handle, described, None)

    def _shut(self, buffers: list[VulkanBuffer]) -> None:
        with reported(f"closing {self.device.name}"):
            vk.vkDeviceWaitIdle(self._device.handle)
        self._cache.clear()
        self._destroy_retired()
        vk.vkDestroyFence(self._device.handle, self._fence, None)
        for pool in (self._pool, self._copies):
            vk.vkDestroyCommandPool(self._device.handle, pool, None)
        self._device.close()


@cache
def _memory_barrier(before: int, after: int) -> list[Any]:
    """For all memory, between two kinds of access."""
    return [vk.VkMemoryBarrier(srcAccessMask=before, dstAccessMask=after)]
