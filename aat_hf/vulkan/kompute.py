"""The provider over `kp` 0.9, Kompute's Python binding, within what its version does safely.

- Every size and shape is checked before (`base`, `limits`, `trial`): it counts bytes in 32 bits, ignores most results
  of the driver, and crashes on the memory it did not get.
- It records no barrier between dispatches, so a batch of independent ones is evaluated at a time; the fence between
  two evaluations orders them.
- Constants are always given as uint32 arrays: it takes anything else for floats.
- Neither time limits nor asynchronous evaluation nor timestamps are used; they misuse fences and query pools. Nor would
  it pay to copy to the device asynchronously: that needs a new sequence each time, which takes longer than the copy.
- It copies whole buffers, whatever part of them is used, through the first coherent kind of memory, cached or not.
- An algorithm is tied to its buffers and workgroups, and a sequence can be recorded only once; both are cached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np

from aat_hf.vulkan import spirv
from aat_hf.vulkan.base import BaseProvider, HostBuffer
from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanError, VulkanUnavailableError
from aat_hf.vulkan.interface import DeviceInfo, Dispatch, shader_code
from aat_hf.vulkan.limits import written_buffers
from aat_hf.vulkan.pipelines import CacheStatistics, PipelineCache
from aat_hf.vulkan.trial import DEVICE_LOCAL, HOST_COHERENT, TrialDevice

_handlers = logging.root.handlers[:]
import kp  # noqa: E402 - between the two lines that undo its call of logging.basicConfig

logging.root.handlers[:] = _handlers

_ALGORITHMS, _SEQUENCES = 256, 64
_SLACK = 1 << 20  # what the binding allocates beside the memory of a buffer
_ATOM = 256  # the largest nonCoherentAtomSize: mapped ranges that are flushed have to be multiples of it


class _Key(NamedTuple):
    shader: str
    spec: tuple[int, ...]
    groups: tuple[int, int, int]
    buffers: tuple[int, ...]  # serials


class _Evaluation(NamedTuple):
    """What one sequence records; buffers by their serials."""

    upload: tuple[int, ...] = ()
    dispatches: tuple[tuple[_Key, Any, tuple[int, ...]], ...] = ()  # with algorithm and push constants
    download: tuple[int, ...] = ()

    @property
    def buffers(self) -> set[int]:
        """All that it touches."""
        return {*self.upload, *self.download}.union(*(key.buffers for key, _, _ in self.dispatches))


class KomputeBuffer(HostBuffer):
    """A tensor of `kp`; its views keep it."""

    def __init__(self, nbytes: int, tensor: Any) -> None:
        super().__init__(nbytes, tensor.data().view(np.uint8))
        self.tensor = tensor


class KomputeProvider(BaseProvider[KomputeBuffer]):
    """See `Provider`."""

    name: ClassVar[str] = "kompute"
    overlaps: ClassVar[bool] = False

    def __init__(self, device: DeviceInfo) -> None:
        super().__init__(device)
        self._trial = TrialDevice(device)
        with _reported(f"opening {device.name}"):
            self._manager = kp.Manager(device.index)
        if (opened := self._manager.get_device_properties()["device_name"]) != device.name:
            raise VulkanUnavailableError(
                f'kompute finds {opened} where the loader lists {device.name}: use AAT_VULKAN_PROVIDER="vulkan"'
            )
        self._algorithms: PipelineCache[_Key, Any] = PipelineCache(_ALGORITHMS, self._compile)
        self._sequences: PipelineCache[_Evaluation, Any] = PipelineCache(_SEQUENCES, self._record)
        self._unsent: dict[int, KomputeBuffer] = {}  # to be uploaded with the next submission, by serial

    @property
    def pipelines(self) -> CacheStatistics:
        """Hits and misses of its compiled shaders."""
        return self._algorithms.statistics

    def _allocate(self, nbytes: int) -> KomputeBuffer:
        room = -(-nbytes // _ATOM) * _ATOM
        if self.device.unified:
            kind, needs = kp.TensorTypes.host, [(room, HOST_COHERENT)]
        else:
            kind, needs = kp.TensorTypes.device, [(room, DEVICE_LOCAL), (room, HOST_COHERENT)]
        try:
            contents = np.empty(room // 4, np.uint32)  # the binding wants some, before it allocates
        except MemoryError as error:
            raise OutOfDeviceMemoryError(f"the host has no room for a buffer of {nbytes} bytes") from error
        self._trial.check(*needs, (_SLACK, HOST_COHERENT))
        with _reported(f"allocating {nbytes} bytes"):
            return KomputeBuffer(nbytes, self._manager.tensor_t(contents, kind))

    def _free(self, buffer: KomputeBuffer) -> None:
        self._unsent.pop(buffer.serial, None)
        self._sequences.discard(lambda evaluation: buffer.serial in evaluation.buffers)
        self._algorithms.discard(lambda key: buffer.serial in key.buffers)
        buffer.tensor = None  # destroying it would pull the memory from under views that are still held

    def _compile(self, key: _Key) -> Any:
        push = np.zeros(spirv.load(key.shader).push_bytes // 4, np.uint32)
        with _reported(f"compiling shader {key.shader!r}"):
            return self._manager.algorithm(
                self._tensors(key.buffers),
                shader_code(key.shader),
                key.groups,
                np.array(key.spec, np.uint32),
                push,
            )

    def _send(self, buffers: list[KomputeBuffer]) -> None:
        self._unsent.update((buffer.serial, buffer) for buffer in buffers)

    def _start(
        self, batches: list[list[Dispatch]], upload: list[KomputeBuffer], download: list[KomputeBuffer]
    ) -> Callable[[], None]:
        unsent, self._unsent = self._unsent, {}
        upload = list((unsent | {buffer.serial: buffer for buffer in upload}).values())
        evaluations = [_Evaluation(dispatches=tuple(map(self._prepare, batch))) for batch in batches]
        if not self.device.unified:
            later = set().union(*(written_buffers(dispatch) for batch in batches[:1] for dispatch in batch))
            evaluations = _with_copies(evaluations, upload, download, later)
        with _reported(f"computing on {self.device.name}"):
            for evaluation in evaluations:
                self._sequences.get(evaluation).eval()
        return _nothing

    def _prepare(self, dispatch: Dispatch) -> tuple[_Key, Any, tuple[int, ...]]:
        buffers: Sequence[Any] = dispatch.buffers
        key = _Key(dispatch.shader, dispatch.spec, dispatch.groups, tuple(buffer.serial for buffer in buffers))
        return key, self._algorithms.get(key), dispatch.push

    def _record(self, evaluation: _Evaluation) -> Any:
        sequence = self._manager.sequence()
        if evaluation.upload:
            sequence.record(kp.OpTensorSyncDevice(self._tensors(evaluation.upload)))
        for _, algorithm, push in evaluation.dispatches:
            sequence.record(kp.OpAlgoDispatch(algorithm, np.array(push, np.uint32)))
        if evaluation.download:
            sequence.record(kp.OpTensorSyncLocal(self._tensors(evaluation.download)))
        return sequence

    def _tensors(self, serials: Iterable[int]) -> list[Any]:
        return [self._owned[serial].tensor for serial in serials]

    def _shut(self, buffers: list[KomputeBuffer]) -> None:
        self._unsent.clear()
        self._sequences.clear()
        self._algorithms.clear()
        for buffer in buffers:
            buffer.tensor = None
        self._manager = None  # destroyed with the last reference; by name it would be done twice
        self._trial.close()


def _with_copies(
    evaluations: list[_Evaluation], upload: list[KomputeBuffer], download: list[KomputeBuffer], written: set[int]
) -> list[_Evaluation]:
    """Add the copies, to evaluations of dispatches where the barriers that `kp` records suffice.

    After an upload it makes the data visible to reading shaders, but neither to writing ones nor to downloads.

    Args:
        written: ids of the buffers that the first evaluation's shaders write.
    """
    evaluations = evaluations or [_Evaluation()]
    sent, fetched = (tuple(buffer.serial for buffer in buffers) for buffers in (upload, download))
    evaluations[-1] = evaluations[-1]._replace(download=fetched)
    clash = written & {id(buffer) for buffer in upload} or set(sent) & set(evaluations[0].download)
    if sent and clash:
        evaluations.insert(0, _Evaluation())
    evaluations[0] = evaluations[0]._replace(upload=sent)
    return [evaluation for evaluation in evaluations if any(evaluation)]


def _nothing() -> None:
    """Nothing to wait for: an evaluation has."""


@contextmanager
def _reported(doing: str) -> Iterator[None]:
    """Turn the binding's exceptions into ours."""
    try:
        yield
    except RuntimeError as error:
        raise VulkanError(f"{doing} failed in kompute: {error}") from error
