"""Micro-kernels of the choice of tiles: masses as whole numbers, whose sums in doubles are exact in any order."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils

from aat_hf.kernels.simd_emit import I64, LANES, VB, VF, Emit, kernel
from aat_hf.kernels.simd_parts import F64, VD, inside, load_part, reduced, store_number, store_part, vectors
from aat_hf.tiling.masks import NONE

_ABOVE = 3e38  # more than any amount


def _bytes_set(e: Emit, address: Any, lanes: Any, than: int = 0) -> Any:
    return e.b.icmp_signed("!=", load_part(e, address, lanes, VB), ir.Constant(VB, [than] * LANES))


def _emit_amounts(e: Emit, mass: Any, forced: Any, states: Any, count: Any, out: Any, sums: Any, units: Any) -> None:
    nothing, one, whole = e.constant(0.0), e.constant(1.0), e.splat(units)
    ceil = cgutils.get_or_insert_function(e.b.module, ir.FunctionType(VF, [VF]), f"llvm.ceil.v{LANES}f32")

    def step(v: Any, carried: list[Any]) -> list[Any]:
        first = e.b.mul(v, I64(LANES))
        lanes = inside(e, first, count)
        x = load_part(e, e.address(mass, first), lanes)
        units_of = e.b.call(ceil, [e.b.fmul(e.maximum(x, nothing), whole)])
        amount = e.b.select(e.b.fcmp_ordered("<=", x, one), units_of, whole)  # NaN counts as 1
        seen = _bytes_set(e, e.b.add(states, first), lanes, NONE)
        seen = e.b.and_(seen, lanes)
        free = e.b.and_(seen, e.b.not_(_bytes_set(e, e.b.add(forced, first), lanes)))
        spare = e.b.select(free, amount, nothing)
        e.store(spare, e.address(out, first))
        all_of_them = e.b.fadd(carried[0], e.b.fpext(e.b.select(seen, amount, nothing), VD))
        number = e.b.fadd(carried[1], e.b.select(seen, one, nothing))
        droppable = e.b.fadd(carried[2], e.b.fpext(spare, VD))
        used = e.b.select(reduced(e, free, "or"), e.b.add(v, I64(1)), carried[4])
        return [all_of_them, number, droppable, e.maximum(spare, carried[3]), used]

    start = [ir.Constant(VD, None), nothing, ir.Constant(VD, None), nothing, I64(0)]
    total, number, spare, highest, used = e.loop(vectors(e, count), start, step)
    numbers = (
        reduced(e, total, "fadd"),
        reduced(e, number, "fadd"),
        reduced(e, spare, "fadd"),
        reduced(e, highest, "fmax"),
    )
    for i, value in enumerate(numbers):
        store_number(e, value if value.type is F64 else e.b.fpext(value, F64), e.address(sums, I64(2 * i)))
    store_number(e, e.b.sitofp(e.b.mul(used, I64(LANES)), F64), e.address(sums, I64(8)))


# (mass, forced, states, count, out, sums, units): out = the masses of a row of `count` tiles, 1 at most and for NaN, as
# a whole number of units, rounded up; 0 where forced or NONE, and to the end of the last vector. sums, doubles: that of
# all that are not NONE, their number; the sum of out, its greatest, and how many elements hold all that are not 0.
amounts = kernel("iiiiiif", _emit_amounts)


def _emit_below(e: Emit, amount: Any, count: Any, sums: Any, bar: Any) -> None:
    bar, nothing, above = e.splat(bar), e.constant(0.0), e.constant(_ABOVE)

    def step(v: Any, carried: list[Any]) -> list[Any]:
        x = e.load(e.address(amount, e.b.mul(v, I64(LANES))))
        low = e.b.fcmp_ordered("<=", x, bar)
        under, over = e.b.select(low, x, nothing), e.b.select(low, above, x)
        least = e.b.select(e.b.fcmp_ordered("<", over, carried[2]), over, carried[2])
        return [e.b.fadd(carried[0], e.b.fpext(under, VD)), e.maximum(under, carried[1]), least]

    total, highest, least = e.loop(vectors(e, count), [ir.Constant(VD, None), nothing, above], step)
    numbers = reduced(e, total, "fadd"), reduced(e, highest, "fmax"), reduced(e, least, "fmin")
    for i, value in enumerate(numbers):
        store_number(e, value if value.type is F64 else e.b.fpext(value, F64), e.address(sums, I64(2 * i)))


# (amounts, count, sums, bar): sums, doubles: the sum of the amounts <= bar, the greatest of them, the least above.
below = kernel("iiif", _emit_below)


def _emit_keep(e: Emit, amount: Any, forced: Any, states: Any, count: Any, out: Any, number: Any, bar: Any) -> None:
    bar, nothing, one = e.splat(bar), e.constant(0.0), e.constant(1.0)

    def step(v: Any, carried: list[Any]) -> list[Any]:
        first = e.b.mul(v, I64(LANES))
        lanes = inside(e, first, count)
        large = e.b.fcmp_ordered(">=", e.load(e.address(amount, first)), bar)
        kept = e.b.or_(large, _bytes_set(e, e.b.add(forced, first), lanes))
        kept = e.b.and_(kept, _bytes_set(e, e.b.add(states, first), lanes, NONE))
        store_part(e, e.b.zext(kept, VB), e.b.add(out, first), lanes)
        return [e.b.fadd(carried[0], e.b.select(e.b.and_(kept, lanes), one, nothing))]

    found = e.loop(vectors(e, count), [nothing], step)[0]
    store_number(e, e.b.fpext(reduced(e, found, "fadd"), F64), number)


# (amounts, forced, states, count, out, number, bar): out, bytes: 1 where forced or the amount is >= bar, and not NONE;
# number, a double: of those.
keep = kernel("iiiiiif", _emit_keep)
