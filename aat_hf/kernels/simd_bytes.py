"""Micro-kernel of scores in 8-bit integers: a quarter of the multiply-adds where the processor has VNNI.

Rows are rounded to 127 steps of their own largest number (`cpu_bytes`). Those of K are stored with 128 added, as VNNI
multiplies unsigned by signed bytes; `shift` takes it out again.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils
from numba.core.registry import cpu_target

from aat_hf.kernels.simd_emit import I32, I64, LANES, PANEL, POINTER, VECTORS, VF, VI, Emit, kernel

_WANTED = {16: ("+avx512vnni",), 8: ("+avxvnni", "+avx512vnni"), 4: ()}[LANES]
BYTES = any(feature in cpu_target.target_context.codegen().magic_tuple()[2].split(",") for feature in _WANTED)
"""Whether the processor multiplies bytes faster than floats."""


def _multiply_add(e: Emit, sums: Any, k: Any, q: Any) -> Any:
    """sums + the four products of the bytes in each lane, those of `k` unsigned and those of `q` signed."""
    if BYTES:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        function = cgutils.get_or_insert_function(e.b.module, ir.FunctionType(VI, [VI] * 3), name)
        return e.b.call(function, [sums, k, q])
    for byte in range(4):
        left, right = (ir.Constant(VI, [bits] * LANES) for bits in (24 - 8 * byte, 24))
        unsigned = e.b.lshr(e.b.shl(k, left), right)
        sums = e.b.add(sums, e.b.mul(unsigned, e.b.ashr(e.b.shl(q, left), right)))
    return sums


def _integers(e: Emit, address: Any) -> list[Any]:
    """A row of a panel of int32."""
    places = [e.b.inttoptr(e.b.add(address, I64(4 * LANES * v)), POINTER) for v in range(VECTORS)]
    return [e.b.load(place, typ=VI, align=4) for place in places]


def _word(e: Emit, address: Any) -> Any:
    """Four bytes, in all lanes."""
    undefined = ir.Constant(VI, ir.Undefined)
    value = e.b.load(e.b.inttoptr(address, POINTER), typ=I32, align=4)
    return e.b.shuffle_vector(e.b.insert_element(undefined, value, I32(0)), undefined, ir.Constant(VI, [0] * LANES))


def _emit_scores(
    e: Emit, k: Any, rows: Any, words: Any, k_scale: Any, q: Any, q_scale: Any, shift: Any, out: Any, top: Any
) -> None:
    step = e.b.shl(words, I64(2))
    less, factors = [e.b.neg(x) for x in _integers(e, shift)], e.panel(q_scale)

    def block(first: Any, size: int) -> None:
        places = [e.b.add(k, e.b.mul(e.b.add(first, I64(r)), step)) for r in range(size)]

        def add(t: Any, sums: list[Any]) -> list[Any]:
            lanes = _integers(e, e.address(q, e.b.mul(t, I64(PANEL))))
            here = [_word(e, e.address(place, t)) for place in places]
            return [_multiply_add(e, x, here[i // VECTORS], lanes[i % VECTORS]) for i, x in enumerate(sums)]

        sums, highest = e.loop(words, less * size, add), e.panel(top)
        for r in range(size):
            own = e.scalar(e.address(k_scale, e.b.add(first, I64(r))))
            floats = [e.b.sitofp(x, VF) for x in sums[r * VECTORS : (r + 1) * VECTORS]]
            values = [e.b.fmul(e.b.fmul(x, own), factor) for x, factor in zip(floats, factors, strict=True)]
            e.store_panel(values, e.address(out, e.b.mul(e.b.add(first, I64(r)), I64(PANEL))))
            highest = [e.maximum(value, old) for value, old in zip(values, highest, strict=True)]
        e.store_panel(highest, top)

    e.blocks(rows, block)


# (K, rows, words of a row, K's scales, Q, Q's scales, shift, out, top): out (rows, PANEL) = the products of the rows of
# K, `words` words of four bytes each, with the panel Q (words, PANEL), in floats; top raised to their maximum.
scores_bytes = kernel("iiiiiiiii", _emit_scores)
