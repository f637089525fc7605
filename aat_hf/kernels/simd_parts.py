"""Rows of any length for micro-kernels: the vector at a row's end is loaded and stored in part."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils

from aat_hf.kernels.simd_emit import I32, I64, LANES, POINTER, VB, VF, VI, Emit

F64 = ir.DoubleType()
VD, V1 = ir.VectorType(F64, LANES), ir.VectorType(ir.IntType(1), LANES)
_SUFFIX = {VF: f"v{LANES}f32", VB: f"v{LANES}i8", VD: f"v{LANES}f64", V1: f"v{LANES}i1"}


def vectors(e: Emit, count: Any) -> Any:
    """How many hold `count` elements."""
    return e.b.sdiv(e.b.add(count, I64(LANES - 1)), I64(LANES))


def inside(e: Emit, first: Any, count: Any) -> Any:
    """The lanes of the vector from element `first` on that are before element `count`."""
    left = e.b.trunc(e.b.sub(count, first), I32)
    left = e.b.insert_element(ir.Constant(VI, ir.Undefined), left, I32(0))
    left = e.b.shuffle_vector(left, left, ir.Constant(VI, [0] * LANES))
    return e.b.icmp_signed("<", ir.Constant(VI, list(range(LANES))), left)


def load_part(e: Emit, address: Any, lanes: Any, kind: Any = VF) -> Any:
    """Floats (VF) or bytes (VB); 0 in the other lanes."""
    parameters = ir.FunctionType(kind, [POINTER, I32, V1, kind])
    function = cgutils.get_or_insert_function(e.b.module, parameters, f"llvm.masked.load.{_SUFFIX[kind]}.p0")
    return e.b.call(function, [e.b.inttoptr(address, POINTER), I32(1), lanes, ir.Constant(kind, None)])


def store_part(e: Emit, value: Any, address: Any, lanes: Any) -> None:
    """Write these lanes of floats or bytes."""
    parameters = ir.FunctionType(ir.VoidType(), [value.type, POINTER, I32, V1])
    function = cgutils.get_or_insert_function(e.b.module, parameters, f"llvm.masked.store.{_SUFFIX[value.type]}.p0")
    e.b.call(function, [value, e.b.inttoptr(address, POINTER), I32(1), lanes])


def reduced(e: Emit, values: Any, how: str) -> Any:
    """The lanes' sum ("fadd", in any order), greatest ("fmax") or least ("fmin"), or whether one is true ("or")."""
    element, start = values.type.element, [values.type.element] if how == "fadd" else []
    name, parameters = (
        f"llvm.vector.reduce.{how}.{_SUFFIX[values.type]}",
        ir.FunctionType(element, [*start, values.type]),
    )
    function = cgutils.get_or_insert_function(e.b.module, parameters, name)
    fast = () if how == "or" else ("reassoc", "nnan")
    return e.b.call(function, [*(kind(0.0) for kind in start), values], fastmath=fast)


def store_number(e: Emit, value: Any, address: Any) -> None:
    """Write a float or double."""
    e.b.store(value, e.b.inttoptr(address, POINTER), align=4)
