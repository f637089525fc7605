"""Micro-kernel of scores in 8-bit integers: a quarter of the multiply-adds where the processor has VNNI.

Rows are rounded to 127 steps of their own largest number (`cpu_bytes`). Those of K are stored with 128 added, as VNNI
multiplies unsigned by signed bytes; `shift` takes it out again.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils
from numba.core.registry import cpu_target

from aat_hf.kernels.simd_emit import F32, I32, I64, LANES, MAGIC, PANEL, POINTER, VB, VECTORS, VF, VI, Emit, kernel

STEPS, OFFSET = 127.0, 128
MAGIC_BITS = 0x4B400000  # MAGIC as a float
_TINY = 1e-30  # rows of zeros are divided by

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


def _larger(e: Emit, bits: Any, old: Any) -> Any:
    """The greater absolute value of two floats, as bits: those are in the same order, NaN the greatest."""
    bits = e.b.and_(bits, ir.Constant(VI, [0x7FFFFFFF] * LANES))
    return e.b.select(e.b.icmp_signed(">", bits, old), bits, old)


def _steps(e: Emit, largest: Any) -> tuple[Any, Any]:
    """The size of a step, and its inverse, of rows with these largest values (bits)."""
    top = e.b.bitcast(largest, VF)
    top = e.b.select(e.b.fcmp_ordered("<", top, e.constant(_TINY)), e.constant(_TINY), top)
    return e.b.fmul(top, e.constant(1 / STEPS)), e.b.fdiv(e.constant(STEPS), top)


def _in_steps(e: Emit, x: Any, inverse: Any) -> Any:
    """Nearest whole number of steps, a signed byte: the low one of 32 bits, those of `MAGIC` added."""
    return e.b.bitcast(e.multiply_add(x, inverse, e.constant(MAGIC)), VI)


def _emit_rows(e: Emit, x: Any, vectors: Any, rows: Any, out: Any, scale: Any) -> None:
    kind = ir.FunctionType(I32, [VI])
    reduced = cgutils.get_or_insert_function(e.b.module, kind, f"llvm.vector.reduce.smax.v{LANES}i32")

    def row(r: Any, _: list[Any]) -> list[Any]:
        first = e.b.mul(e.b.mul(r, vectors), I64(LANES))
        start, place = e.address(x, first), e.b.add(out, first)

        def largest(i: Any, old: list[Any]) -> list[Any]:
            values = e.load(e.address(start, e.b.mul(i, I64(LANES))))
            return [_larger(e, e.b.bitcast(values, VI), old[0])]

        top = e.b.call(reduced, e.loop(vectors, [ir.Constant(VI, None)], largest))
        step, inverse = _steps(e, e.b.bitcast(e.splat(e.b.bitcast(top, F32)), VI))
        e.b.store(e.b.extract_element(step, I32(0)), e.b.inttoptr(e.address(scale, r), POINTER), align=4)

        def write(i: Any, _: list[Any]) -> list[Any]:
            at = e.b.mul(i, I64(LANES))
            signed = e.b.trunc(_in_steps(e, e.load(e.address(start, at)), inverse), VB)
            unsigned = e.b.xor(signed, ir.Constant(VB, [OFFSET] * LANES))  # 128 more
            e.b.store(unsigned, e.b.inttoptr(e.b.add(place, at), POINTER), align=1)
            return []

        e.loop(vectors, [], write)
        return []

    e.loop(rows, [], row)


# (x, vectors, rows, out, scale): rows of `vectors` * LANES floats as bytes, 128 added, in steps of scale[row].
round_rows = kernel("iiiii", _emit_rows)


def _emit_panel(e: Emit, x: Any, words: Any, out: Any, scale: Any, shift: Any) -> None:
    def row(place: Any, number: Any) -> Any:
        return e.address(place, e.b.mul(number, I64(PANEL)))

    def largest(d: Any, old: list[Any]) -> list[Any]:
        return [_larger(e, bits, o) for bits, o in zip(_integers(e, row(x, d)), old, strict=True)]

    tops = e.loop(e.b.shl(words, I64(2)), [ir.Constant(VI, None)] * VECTORS, largest)
    steps, inverses = zip(*(_steps(e, top) for top in tops), strict=True)
    e.store_panel(list(steps), scale)
    low = ir.Constant(VI, [255] * LANES)

    def word(w: Any, before: list[Any]) -> list[Any]:
        sums, packed = list(before), [ir.Constant(VI, None)] * VECTORS
        for byte in range(4):
            values = e.panel(row(x, e.b.add(e.b.shl(w, I64(2)), I64(byte))))
            for v, value in enumerate(values):
                bits, left = _in_steps(e, value, inverses[v]), ir.Constant(VI, [8 * byte] * LANES)
                packed[v] = e.b.or_(packed[v], e.b.shl(e.b.and_(bits, low), left))
                sums[v] = e.b.add(sums[v], e.b.sub(bits, ir.Constant(VI, [MAGIC_BITS] * LANES)))
        e.store_panel([e.b.bitcast(x, VF) for x in packed], row(out, w))
        return sums

    sums = e.loop(words, [ir.Constant(VI, None)] * VECTORS, word)
    offset = ir.Constant(VI, [OFFSET] * LANES)
    e.store_panel([e.b.bitcast(e.b.mul(x, offset), VF) for x in sums], shift)


# (x, words, out, scale, shift): a panel (4 * words, PANEL) of floats as words of four signed bytes, in steps of
# scale[lane]; shift = 128 times the sum of a lane's bytes.
round_panel = kernel("iiiii", _emit_panel)
