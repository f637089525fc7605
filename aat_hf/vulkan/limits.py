"""Refuse what a device cannot take before its driver sees it: drivers and bindings need not check, and crash.

`batches` finds which dispatches of a submission depend on each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

from aat_hf.vulkan import spirv
from aat_hf.vulkan.errors import VulkanLimitError
from aat_hf.vulkan.interface import DeviceInfo, Dispatch

_SIZES = 2**32 - 1  # kompute counts bytes in 32 bits
# Capabilities (SPIR-V, section 3.31) of every Vulkan 1.1 device, and those that come with subgroup operations.
_ALWAYS = {0, 1, 61}  # Matrix, Shader, GroupNonUniform
_SUBGROUP = {
    62: "vote",
    63: "arithmetic",
    64: "ballot",
    65: "shuffle",
    66: "shuffle_relative",
    67: "clustered",
    68: "quad",
}


def longest(device: DeviceInfo) -> int:
    """Bytes of the longest buffer."""
    return min(device.max_storage_bytes, _SIZES) // 4 * 4


def check_size(nbytes: int, device: DeviceInfo) -> int:
    """`nbytes` rounded up to words.

    Raises:
        VulkanLimitError: not positive, or longer than a shader can bind.
    """
    if nbytes < 1:
        raise VulkanLimitError(f"a buffer of {nbytes} bytes was asked for; give at least 1")
    words = -(-nbytes // 4) * 4
    if words > longest(device):
        raise VulkanLimitError(
            f"a buffer of {words} bytes is longer than {device.name} can bind ({longest(device)}): "
            "split the work, or compute on the CPU"
        )
    return words


def check_dispatch(dispatch: Dispatch, device: DeviceInfo) -> None:
    """Compare a dispatch with its shader and the device.

    Raises:
        VulkanLimitError: the first thing that does not fit.
    """
    given = dispatch.shader, dispatch.spec, dispatch.groups, len(dispatch.buffers), 4 * len(dispatch.push)
    refusal = _refusal(device, *given)
    if refusal is None and not all(0 <= word < 2**32 for word in (*dispatch.spec, *dispatch.push)):
        refusal = "takes constants as unsigned 32-bit words (see float_bits)"
    if refusal is not None:
        raise VulkanLimitError(f"shader {dispatch.shader!r} {refusal} (on {device.name})")


@lru_cache(maxsize=256)
def _refusal(
    device: DeviceInfo, shader: str, spec: tuple[int, ...], groups: tuple[int, int, int], buffers: int, push_bytes: int
) -> str | None:
    """What of a dispatch does not fit; None: all does."""
    module = spirv.load(shader)
    local, shared_bytes = spirv.workgroup(shader, spec)
    needs = [
        (buffers > max(module.bindings, default=0), f"binds buffers {sorted(module.bindings)}, {buffers} are given"),
        (buffers <= device.max_buffers, f"binds more than {device.max_buffers} buffers"),
        (push_bytes == module.push_bytes,
         f"takes {module.push_bytes} bytes of push constants, {push_bytes} are given"),
        (module.push_bytes <= device.max_push_bytes,
         f"takes more than {device.max_push_bytes} bytes of push constants"),
        (all(1 <= count <= most for count, most in zip(groups, device.max_groups, strict=True)),
         f"is dispatched with {groups} workgroups, not within 1 and {device.max_groups}"),
        (all(1 <= size <= most for size, most in zip(local, device.max_local, strict=True))
         and math.prod(local) <= device.max_invocations,
         f"has workgroups of {local}, more than {device.max_local} or {device.max_invocations} in all"),
        (shared_bytes <= device.max_shared_bytes,
         f"shares {shared_bytes} bytes in a workgroup, more than {device.max_shared_bytes}"),
        (not (missing := _missing(module.capabilities, device)), f"needs {missing}, which is not enabled"),
    ]  # fmt: skip
    return next((what for met, what in needs if not met), None)


def _missing(capabilities: Iterable[int], device: DeviceInfo) -> str:
    """Names of what a shader needs beyond a device without optional features."""
    subgroup = {number for number, name in _SUBGROUP.items() if name in device.subgroup_operations}
    missing = set(capabilities) - _ALWAYS - subgroup
    return ", ".join(_SUBGROUP.get(number, f"SPIR-V capability {number}") for number in sorted(missing))


def batches(dispatches: Sequence[Dispatch]) -> list[list[Dispatch]]:
    """Runs of dispatches that do not touch what another of the same run writes; a barrier belongs between runs."""
    found: list[list[Dispatch]] = []
    read: set[int] = set()
    written: set[int] = set()
    for dispatch in dispatches:
        touched = {id(buffer) for buffer in dispatch.buffers}
        writes = written_buffers(dispatch)
        if not found or touched & written or writes & read:
            found.append([])
            read, written = set(), set()
        found[-1].append(dispatch)
        read |= touched
        written |= writes
    return found


def written_buffers(dispatch: Dispatch) -> set[int]:
    """The ids of the buffers that the shader may write."""
    bindings = spirv.load(dispatch.shader).bindings
    return {id(buffer) for binding, buffer in enumerate(dispatch.buffers) if bindings.get(binding)}
