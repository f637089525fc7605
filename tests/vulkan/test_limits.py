from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
from fake import DEVICE, FakeBuffer
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.vulkan import limits, spirv
from aat_hf.vulkan.errors import VulkanError, VulkanLimitError
from aat_hf.vulkan.interface import SHADERS, Dispatch, float_bits, shader_code

A, B, C, D, E = (FakeBuffer(4096) for _ in range(5))
GOOD = Dispatch("smoke", (A, B), (10, 1, 1), (64, 1), (640, float_bits(0.5)))


def test_reads_a_shader_of_the_package():
    module = spirv.load("smoke")
    assert module.bindings == {0: False, 1: True} and module.push_bytes == 8 and module.capabilities == {1}
    assert module.local_size((48,)) == (48, 1, 1) and module.local_size(()) == (1, 1, 1)
    assert module.shared_bytes((48,)) == 192


@pytest.mark.parametrize("shader", sorted(path.stem for path in SHADERS.glob("*.spv")))
def test_every_shader_is_legal_without_features(shader: str):
    module = spirv.load(shader)
    able = dataclasses.replace(DEVICE, subgroup_operations=frozenset({"arithmetic", "shuffle", "ballot", "clustered"}))
    assert limits._missing(module.capabilities, able) == ""
    assert module.bindings and any(module.bindings.values()) and module.push_bytes <= 128
    assert module.shared_bytes(()) >= 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffers": ()}, "binds buffers"),
        ({"buffers": (A,)}, r"binds buffers \[0, 1\], 1 are given"),
        ({"buffers": (A, B, C, D, E)}, "more than 4 buffers"),
        ({"push": (640,)}, "8 bytes of push constants, 4 are given"),
        ({"push": (640, -1)}, "unsigned 32-bit words"),
        ({"spec": (64, 2**32)}, "unsigned 32-bit words"),
        ({"groups": (1001, 1, 1)}, "1001, 1, 1"),
        ({"groups": (1, 101, 1)}, "workgroups"),
        ({"groups": (1, 1, 0)}, "workgroups"),
        ({"spec": (257, 1)}, "workgroups of"),
        ({"spec": (0, 1)}, "workgroups of"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str):
    limits.check_dispatch(GOOD, DEVICE)
    with pytest.raises(VulkanLimitError, match=message):
        limits.check_dispatch(dataclasses.replace(GOOD, **change), DEVICE)


def test_shared_memory_and_capabilities_are_compared():
    small = dataclasses.replace(DEVICE, max_shared_bytes=255)
    with pytest.raises(VulkanLimitError, match="shares 256 bytes"):
        limits.check_dispatch(GOOD, small)
    assert limits._missing({1, 9, 63}, DEVICE) == "SPIR-V capability 9, arithmetic"


@pytest.mark.parametrize("nbytes", [0, -4, DEVICE.max_storage_bytes + 1, 2**32, 2**40])
def test_sizes_are_refused(nbytes: int):
    with pytest.raises(VulkanLimitError):
        limits.check_size(nbytes, DEVICE)


def test_sizes_stay_below_4_gib_on_any_device():
    huge = dataclasses.replace(DEVICE, max_storage_bytes=2**32 - 1)
    assert limits.check_size(2**32 - 7, huge) == limits.longest(huge) == 2**32 - 4
    with pytest.raises(VulkanLimitError):
        limits.check_size(2**32 - 3, huge)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=30))
def test_batches_are_independent_and_in_order(pairs: list[tuple[int, int]]):
    pool = (A, B, C, D, E)
    steps = [Dispatch("smoke", (pool[x], pool[y]), (1, 1, 1), (1, 0), (1, 0)) for x, y in pairs]
    found = limits.batches(steps)
    assert [id(step) for batch in found for step in batch] == [id(step) for step in steps]
    for batch in found:
        for i, earlier in enumerate(batch):
            for later in batch[i + 1 :]:
                assert earlier.buffers[1] not in later.buffers and later.buffers[1] not in earlier.buffers
    for before, after in itertools.pairwise(found):  # a run ends only where it has to
        first = after[0]
        assert any(step.buffers[1] in first.buffers or first.buffers[1] in step.buffers for step in before)


@pytest.mark.parametrize("code", [b"", b"\0" * 20, b"\1\2\3"])
def test_what_is_no_spirv_is_refused(code: bytes, tmp_path: Path):
    path = tmp_path / "broken.spv"
    path.write_bytes(code)
    with pytest.raises(VulkanError, match="no valid SPIR-V"):
        spirv.load(str(path))


@given(st.data())
def test_a_damaged_module_is_an_error_or_a_module(data: st.DataObject):
    code = bytearray(shader_code("smoke"))
    for place in data.draw(st.lists(st.integers(0, len(code) - 1), max_size=3)):
        code[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(code)))
    try:
        module = spirv.parse(bytes(code[:cut]))
    except (ValueError, LookupError, VulkanError):
        return
    assert module.push_bytes >= 0


def test_a_shader_that_is_missing_is_named():
    with pytest.raises(VulkanError, match="shader 'nothing': cannot read"):
        shader_code("nothing")
