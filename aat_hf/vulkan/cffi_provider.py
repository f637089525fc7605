"""The provider over the PyPI package `vulkan`: every barrier recorded, every VkResult an exception."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
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
_LIB, _NULL = vk.lib, vk.ffi.NULL  # calls without a result, which the binding's wrappers only slow down
_ONCE = vk.VkCommandBufferBeginInfo(flags=vk.VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT)


class _Key(NamedTuple):
    shader: str
    spec: tuple[int, ...]
    buffers: int


class _Commands(NamedTuple):
    """A command buffer, what submits it, and a fence for the end of that.

    Kept, as the binding takes tens of microseconds to make such a structure; those of `VulkanBuffer` too.
    """

    handle: Any
    submission: list[Any]
    fence: Any


class _DescriptorPool(NamedTuple):
    """Room for so many sets of so many buffers in all."""

    sets: int
    buffers: int
    handle: Any


class _Flight(NamedTuple):
    """A submission that the device may be executing, with the copies to the device that went before."""

    commands: _Commands
    descriptors: _DescriptorPool
    sent: list[_Commands]


class VulkanBuffer(HostBuffer):
    """A storage buffer, and where memory is not unified its copy on the host."""

    def __init__(self, nbytes: int, mapped: NDArray[np.uint8], main: Any, staging: Any | None) -> None:
        super().__init__(nbytes, mapped)
        self.main, self.staging = main, staging
        self.whole = vk.VkDescriptorBufferInfo(main.handle, 0, nbytes)
        self._region = vk.ffi.new("VkBufferCopy[1]")

    @property
    def region(self) -> Any:
        """What of it is copied."""
        self._region[0].size = self.used
        return self._region


class VulkanProvider(BaseProvider[VulkanBuffer]):
    """See `Provider`; no optional feature of the device is enabled, and no shader that needs one accepted."""

    name: ClassVar[str] = "vulkan"
    overlaps: ClassVar[bool] = True

    def __init__(self, device: DeviceInfo) -> None:
        super().__init__(device)
        self._device = Device(device)
        self._cache: PipelineCache[_Key, Pipeline] = PipelineCache(_PIPELINES, self._compile, self._retire)
        self._retired: list[Pipeline] = []  # no longer cached, but maybe recorded
        with reported(f"opening {device.name}"):
            pool = vk.VkCommandPoolCreateInfo(
                queueFamilyIndex=self._device.queue_family, flags=vk.VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT
            )
            self._pool = vk.vkCreateCommandPool(self._device.handle, pool, None)
        self._fences: list[Any] = []  # of all commands
        self._descriptor_pools: list[Any] = []
        self._descriptors: dict[tuple[int, int], list[_DescriptorPool]] = {}  # idle ones
        self._idle: list[_Commands] = []
        self._sent: list[_Commands] = []  # since the last submission
        self._flying = 0  # submissions not waited for

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
        if self._sent or self._flying:
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

    def _send(self, buffers: list[VulkanBuffer]) -> None:
        if self.device.unified:
            return
        with reported(f"copying to {self.device.name}"):
            commands = self._commands()
            vk.vkBeginCommandBuffer(commands.handle, _ONCE)  # no barrier: it may overtake what is being computed
            for buffer in buffers:
                self._copy(commands.handle, buffer.staging, buffer.main, buffer)
            vk.vkEndCommandBuffer(commands.handle)
            vk.vkQueueSubmit(self._device.queue, 1, commands.submission, vk.VK_NULL_HANDLE)
            self._sent.append(commands)

    def _start(
        self, batches: list[list[Dispatch]], upload: list[VulkanBuffer], download: list[VulkanBuffer]
    ) -> Callable[[], None]:
        with reported(f"computing on {self.device.name}"):
            commands, descriptors = self._commands(), self._descriptor_pool(batches)
            try:
                self._record(commands.handle, batches, upload, download, descriptors.handle)
                vk.vkQueueSubmit(self._device.queue, 1, commands.submission, commands.fence)
            except BaseException:
                vk.vkResetCommandBuffer(commands.handle, 0)
                self._recycle(descriptors, commands)
                raise
        flight, self._sent = _Flight(commands, descriptors, self._sent), []
        self._flying += 1
        return partial(self._wait, flight)

    def _wait(self, flight: _Flight) -> None:
        self._check_usable()
        with self._lock, reported(f"computing on {self.device.name}"):
            self._check_usable()  # another thread may have closed it
            fences = [flight.commands.fence]
            vk.vkWaitForFences(self._device.handle, 1, fences, vk.VK_TRUE, _FOREVER)
            vk.vkResetFences(self._device.handle, 1, fences)
            self._recycle(flight.descriptors, flight.commands, *flight.sent)
            self._flying -= 1
            if not self._flying:
                self._destroy_retired()

    def _recycle(self, descriptors: _DescriptorPool, *commands: _Commands) -> None:
        vk.vkResetDescriptorPool(self._device.handle, descriptors.handle, 0)
        self._descriptors[descriptors[:2]].append(descriptors)
        self._idle += commands

    def _record(
        self,
        commands: Any,
        batches: list[list[Dispatch]],
        upload: list[VulkanBuffer],
        download: list[VulkanBuffer],
        descriptors: Any,
    ) -> None:
        vk.vkBeginCommandBuffer(commands, _ONCE)
        self._barrier(commands, _DEVICE, _DEVICE)  # what earlier submissions wrote becomes visible
        for buffer in upload:
            self._copy(commands, buffer.staging, buffer.main, buffer)
        self._barrier(commands, _TRANSFER, _DEVICE)
        for batch in batches:
            for dispatch in batch:
                self._dispatch(commands, dispatch, descriptors)
            self._barrier(commands, _COMPUTE, _DEVICE)
        for buffer in download:
            self._copy(commands, buffer.main, buffer.staging, buffer)
        self._barrier(commands, _DEVICE, _HOST)
        vk.vkEndCommandBuffer(commands)

    def _commands(self) -> _Commands:
        if self._idle:
            return self._idle.pop()
        described = vk.VkCommandBufferAllocateInfo(
            commandPool=self._pool, level=vk.VK_COMMAND_BUFFER_LEVEL_PRIMARY, commandBufferCount=1
        )
        handle = vk.vkAllocateCommandBuffers(self._device.handle, described)[0]
        fence = vk.vkCreateFence(self._device.handle, vk.VkFenceCreateInfo(), None)
        self._fences.append(fence)
        return _Commands(handle, [vk.VkSubmitInfo(pCommandBuffers=[handle])], fence)

    def _barrier(self, commands: Any, before: tuple[int, int], after: tuple[int, int]) -> None:
        memory = _memory_barrier(before[1], after[1])
        _LIB.vkCmdPipelineBarrier(commands, before[0], after[0], 0, 1, memory, 0, _NULL, 0, _NULL)

    def _copy(self, commands: Any, source: Any, target: Any, buffer: VulkanBuffer) -> None:
        if source is not None and target is not None:  # unified memory needs no copy
            _LIB.vkCmdCopyBuffer(commands, source.handle, target.handle, 1, buffer.region)

    def _dispatch(self, commands: Any, dispatch: Dispatch, descriptors: Any) -> None:
        pipeline = self._cache.get(_Key(dispatch.shader, dispatch.spec, len(dispatch.buffers)))
        buffers: Sequence[Any] = dispatch.buffers
        bound = self._bind(pipeline, buffers, descriptors)
        point = vk.VK_PIPELINE_BIND_POINT_COMPUTE
        _LIB.vkCmdBindPipeline(commands, point, pipeline.pipeline)
        _LIB.vkCmdBindDescriptorSets(commands, point, pipeline.layout, 0, 1, [bound], 0, _NULL)
        if dispatch.push:
            words = vk.ffi.new("uint32_t[]", list(dispatch.push))
            size, stage = 4 * len(dispatch.push), vk.VK_SHADER_STAGE_COMPUTE_BIT
            _LIB.vkCmdPushConstants(commands, pipeline.layout, stage, 0, size, words)
        _LIB.vkCmdDispatch(commands, *dispatch.groups)

    def _bind(self, pipeline: Pipeline, buffers: Sequence[VulkanBuffer], descriptors: Any) -> Any:
        """A descriptor set with the buffers at bindings 0, 1, ..."""
        layouts = [pipeline.set_layout]
        described = vk.VkDescriptorSetAllocateInfo(descriptorPool=descriptors, pSetLayouts=layouts)
        bound = vk.vkAllocateDescriptorSets(self._device.handle, described)[0]
        whole = [buffer.whole for buffer in buffers]
        write = vk.VkWriteDescriptorSet(  # binding 0 and, as it has room for one buffer, those that follow
            dstSet=bound,
            dstBinding=0,
            descriptorCount=len(whole),
            descriptorType=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
            pBufferInfo=whole,
        )
        vk.vkUpdateDescriptorSets(self._device.handle, 1, [write], 0, None)
        return bound

    def _descriptor_pool(self, batches: list[list[Dispatch]]) -> _DescriptorPool:
        counts = [len(dispatch.buffers) for batch in batches for dispatch in batch] or [1]
        size = len(counts), sum(counts)
        if idle := self._descriptors.setdefault(size, []):
            return idle.pop()
        sizes = [vk.VkDescriptorPoolSize(type=vk.VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, descriptorCount=size[1])]
        described = vk.VkDescriptorPoolCreateInfo(maxSets=size[0], pPoolSizes=sizes)
        self._descriptor_pools.append(vk.vkCreateDescriptorPool(self._device.handle, described, None))
        return _DescriptorPool(*size, self._descriptor_pools[-1])

    def _shut(self, buffers: list[VulkanBuffer]) -> None:
        with reported(f"closing {self.device.name}"):
            vk.vkDeviceWaitIdle(self._device.handle)
        self._cache.clear()
        self._destroy_retired()
        for fence in self._fences:
            vk.vkDestroyFence(self._device.handle, fence, None)
        for pool in self._descriptor_pools:
            vk.vkDestroyDescriptorPool(self._device.handle, pool, None)
        vk.vkDestroyCommandPool(self._device.handle, self._pool, None)
        self._device.close()


@cache
def _memory_barrier(before: int, after: int) -> Any:
    """For all memory, between two kinds of access."""
    return vk.ffi.new("VkMemoryBarrier[1]", [vk.VkMemoryBarrier(srcAccessMask=before, dstAccessMask=after)])
