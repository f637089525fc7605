"""What a compute shader asks for, read from its SPIR-V: bindings, push constants, workgroup, capabilities.

The layout of a module and its instructions is that of the SPIR-V specification 1.6, sections 2.3 and 3. Drivers trust
a module; reading it first lets a wrong dispatch be refused where a binding would crash.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from aat_hf.vulkan.errors import VulkanError
from aat_hf.vulkan.interface import shader_code

_MAGIC, _HEADER_WORDS = 0x07230203, 5
_EXECUTION_MODE, _CAPABILITY = 16, 17
_TYPE_INT, _TYPE_FLOAT, _TYPE_VECTOR, _TYPE_MATRIX, _TYPE_ARRAY, _TYPE_STRUCT, _TYPE_POINTER = (
    21,
    22,
    23,
    24,
    28,
    30,
    32,
)
_CONSTANT, _SPEC_CONSTANT, _SPEC_COMPOSITE, _SPEC_OPERATION = 43, 50, 51, 52
_EXTRACT = 81
_CONSTANT_COMPOSITE, _VARIABLE, _DECORATE, _MEMBER_DECORATE = 44, 59, 71, 72
_LOCAL_SIZE, _LOCAL_SIZE_ID, _EXECUTION_MODE_ID = 17, 38, 331
_SPEC_ID, _ARRAY_STRIDE, _MATRIX_STRIDE, _BUILTIN, _NON_WRITABLE, _BINDING, _OFFSET = 1, 6, 7, 11, 24, 33, 35
_WORKGROUP_SIZE = 25
_UNIFORM, _WORKGROUP, _PUSH_CONSTANT, _STORAGE_BUFFER = 2, 4, 9, 12
_OPERATIONS: dict[int, Callable[..., int]] = {
    124: lambda value: value,  # Bitcast
    128: operator.add,
    130: operator.sub,
    132: operator.mul,
    134: operator.floordiv,
    135: operator.floordiv,  # signed; sizes are positive
    137: operator.mod,
    194: operator.rshift,
    196: operator.lshift,
    197: operator.or_,
    198: operator.xor,
    199: operator.and_,
}


@dataclass
class Module:
    """The instructions of a module that matter here, by result id.

    Attributes:
        capabilities: numbers of SPIR-V's section 3.31.
        bindings: binding -> whether the shader may write the buffer; push_bytes: size of its push constants.
    """

    capabilities: frozenset[int] = frozenset()
    bindings: dict[int, bool] = field(default_factory=dict)
    push_bytes: int = 0
    _types: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _constants: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _decorations: dict[tuple[int, int], int] = field(default_factory=dict)  # (result, decoration)
    _members: dict[tuple[int, int, int], int] = field(default_factory=dict)  # (struct, member, decoration)
    _variables: list[tuple[int, int, int]] = field(default_factory=list)
    _local_size: tuple[int, ...] = (1, 1, 1)
    _local_ids: tuple[int, ...] = ()

    def local_size(self, spec: Sequence[int]) -> tuple[int, ...]:
        """Invocations of a workgroup along x, y, z with these specialisation constants."""
        for (result, decoration), number in self._decorations.items():
            if decoration == _BUILTIN and number == _WORKGROUP_SIZE:
                return tuple(self._value(part, spec) for part in self._constants[result][1:])
        if self._local_ids:
            return tuple(self._value(part, spec) for part in self._local_ids)
        return self._local_size

    def shared_bytes(self, spec: Sequence[int]) -> int:
        """Shared memory of a workgroup with these specialisation constants."""
        shared = (pointed for _, storage, pointed in self._variables if storage == _WORKGROUP)
        return sum(self._size(pointed, spec) for pointed in shared)

    def _value(self, constant: int, spec: Sequence[int]) -> int:
        """An integer constant: opcode and operands as `_constants` holds them."""
        opcode, *operands = self._constants[constant]
        if opcode == _SPEC_OPERATION:
            operation, *arguments = operands
            if operation == _EXTRACT:
                return self._value(self._constants[arguments[0]][1 + arguments[1]], spec)
            if operation not in _OPERATIONS:
                raise VulkanError(f"a workgroup's size uses the SPIR-V operation {operation}, which is not evaluated")
            return _OPERATIONS[operation](*(self._value(argument, spec) for argument in arguments)) & 0xFFFFFFFF
        place = self._decorations.get((constant, _SPEC_ID))
        return spec[place] if place is not None and place < len(spec) else operands[0]

    def _size(self, of: int, spec: Sequence[int] = ()) -> int:
        """Bytes of a type: with its strides where it has them, else packed."""
        opcode, *operands = self._types[of]
        if opcode in (_TYPE_INT, _TYPE_FLOAT):
            return operands[0] // 8
        if opcode in (_TYPE_VECTOR, _TYPE_MATRIX):
            return operands[1] * self._size(operands[0], spec)
        if opcode == _TYPE_ARRAY:
            stride = self._decorations.get((of, _ARRAY_STRIDE)) or self._size(operands[0], spec)
            return stride * self._value(operands[1], spec)
        if opcode != _TYPE_STRUCT:
            raise VulkanError(f"a shader's interface has a type that is not measured (SPIR-V opcode {opcode})")
        return self._struct_size(of, operands, spec)

    def _struct_size(self, of: int, members: Sequence[int], spec: Sequence[int]) -> int:
        end = 0
        for place, member in enumerate(members):
            size = self._size(member, spec)
            if (stride := self._members.get((of, place, _MATRIX_STRIDE))) is not None:
                size = stride * self._types[member][2]
            end = self._members.get((of, place, _OFFSET), end) + size
        return end

    def _finish(self) -> Module:
        """Resolve what needs the whole module."""
        for variable, storage, pointed in self._variables:
            if storage == _PUSH_CONSTANT:
                self.push_bytes = self._size(pointed)
            elif storage in (_STORAGE_BUFFER, _UNIFORM):
                binding = self._decorations[variable, _BINDING]
                # bindings that share a buffer are declared once each; one that may be written decides
                self.bindings[binding] = self.bindings.get(binding, False) or self._writable(variable, pointed)
        return self

    def _writable(self, variable: int, block: int) -> bool:
        members = range(len(self._types[block]) - 1)
        read_only = all((block, member, _NON_WRITABLE) in self._members for member in members)
        return not (read_only or (variable, _NON_WRITABLE) in self._decorations)


@lru_cache(maxsize=256)
def load(shader: str) -> Module:
    """The module of a shader (see `interface.shader_code`)."""
    try:
        return parse(shader_code(shader))
    except (LookupError, ValueError) as error:
        raise VulkanError(f"shader {shader!r} is no valid SPIR-V ({error}); rebuild or reinstall it") from error


@lru_cache(maxsize=256)
def workgroup(shader: str, spec: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Invocations along x, y, z and shared memory of a workgroup with these specialisation constants."""
    module = load(shader)
    return module.local_size(spec), module.shared_bytes(spec)


def parse(code: bytes) -> Module:
    """Read a module.

    Raises:
        ValueError, LookupError: it is no SPIR-V, or a part of it is missing.
    """
    module, pointers, capabilities = Module(), {}, set()
    for opcode, words in _instructions(code):
        if opcode == _CAPABILITY:
            capabilities.add(words[0])
        elif opcode in (_EXECUTION_MODE, _EXECUTION_MODE_ID) and words[1] == _LOCAL_SIZE:
            module._local_size = words[2:5]
        elif opcode == _EXECUTION_MODE_ID and words[1] == _LOCAL_SIZE_ID:
            module._local_ids = words[2:5]
        elif opcode == _DECORATE:
            module._decorations[words[0], words[1]] = words[2] if len(words) > 2 else 0
        elif opcode == _MEMBER_DECORATE:
            module._members[words[0], words[1], words[2]] = words[3] if len(words) > 3 else 0
        elif opcode == _TYPE_POINTER:
            pointers[words[0]] = words[2]
        elif _TYPE_INT <= opcode <= _TYPE_STRUCT:
            module._types[words[0]] = (opcode, *words[1:])
        elif opcode in (_CONSTANT, _CONSTANT_COMPOSITE, _SPEC_CONSTANT, _SPEC_COMPOSITE, _SPEC_OPERATION):
            module._constants[words[1]] = (opcode, *words[2:])
        elif opcode == _VARIABLE and words[2] in (_UNIFORM, _WORKGROUP, _PUSH_CONSTANT, _STORAGE_BUFFER):
            module._variables.append((words[1], words[2], pointers[words[0]]))
    module.capabilities = frozenset(capabilities)
    return module._finish()


def _instructions(code: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Opcode and operand words of each instruction."""
    if len(code) % 4 or len(code) < 4 * _HEADER_WORDS:
        raise ValueError(f"{len(code)} bytes are no module")
    words = np.frombuffer(code, "<u4").tolist()
    if words[0] != _MAGIC:
        raise ValueError(f"it begins with {words[0]:#010x}, not {_MAGIC:#010x}")
    place = _HEADER_WORDS
    while place < len(words):
        count, opcode = words[place] >> 16, words[place] & 0xFFFF
        if not count or place + count > len(words):
            raise ValueError(f"it is cut short at word {place}")
        yield opcode, tuple(words[place + 1 : place + count])
        place += count
