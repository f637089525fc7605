"""Micro-kernels over rows of tile masses: blended with their neighbours, summed over what is left out."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations

from aat_hf.kernels.simd_emit import I64, LANES, VB, Emit, kernel
from aat_hf.kernels.simd_parts import inside, load_part, reduced, store_number, store_part, vectors
from aat_hf.tiling.masks import NONE


def _emit_blend(
    e: Emit, a: Any, b: Any, before: Any, after: Any, states: Any, count: Any, out: Any, sums: Any, *weights: Any
) -> None:
    (less, more), half, nothing = (e.splat(x) for x in weights), e.constant(0.5), e.constant(0.0)

    def one(v: Any, totals: list[Any]) -> list[Any]:
        first = e.b.mul(v, I64(LANES))
        lanes = inside(e, first, count)

        def both(step: Any) -> Any:
            place = e.b.add(first, step)
            return e.b.fadd(*(load_part(e, e.address(x, place), lanes) for x in (a, b)))

        own = both(I64(0))
        value = e.multiply_add(both(after), more, e.multiply_add(both(before), less, own))
        seen = e.b.icmp_signed("!=", load_part(e, e.b.add(states, first), lanes, VB), ir.Constant(VB, [NONE] * LANES))
        value = e.b.select(seen, e.b.fmul(half, value), nothing)
        store_part(e, value, e.address(out, first), lanes)
        return [e.multiply_add(own, half, totals[0]), e.b.fadd(totals[1], value)]

    for i, total in enumerate(e.loop(vectors(e, count), [nothing, nothing], one)):
        store_number(e, reduced(e, total, "fadd"), e.address(sums, I64(i)))


# (a, b, before, after, states, count, out, sums, less, more): out = mean of the rows a and b of `count` tiles, plus
# `less` times that of the rows `before` elements further on and `more` times that of those `after`, 0 where the state
# is NONE; sums = that of the mean and that of out.
blend_rows = kernel("iiiiiiiiff", _emit_blend)


def _emit_left_out(e: Emit, mass: Any, kept: Any, count: Any, out: Any) -> None:
    def one(v: Any, totals: list[Any]) -> list[Any]:
        first = e.b.mul(v, I64(LANES))
        lanes = inside(e, first, count)
        culled = e.b.icmp_signed("==", load_part(e, e.b.add(kept, first), lanes, VB), ir.Constant(VB, None))
        return [e.b.fadd(totals[0], load_part(e, e.address(mass, first), e.b.and_(lanes, culled)))]

    store_number(e, reduced(e, e.loop(vectors(e, count), [e.constant(0.0)], one)[0], "fadd"), out)


# (mass, kept, count, out): out = sum of the masses of a row of `count` tiles that are not kept (uint8 0).
left_out = kernel("iiii", _emit_left_out)
