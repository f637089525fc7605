"""Micro-kernels of the row measurement: second-order scores of groups of keys, masks; one panel of queries each."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils

from aat_hf.kernels.simd_emit import I32, I64, LANES, PANEL, POINTER, VECTORS, VF, VI, Emit, kernel


def _emit_outside(e: Emit, scores: Any, rows: Any, key: Any, first: Any, last: Any, top: Any, fill: Any) -> None:
    fill, wide = e.splat(fill), ir.VectorType(I64, LANES)

    def bounds(at: Any) -> list[Any]:
        places = [e.b.inttoptr(e.b.add(at, I64(8 * LANES * v)), POINTER) for v in range(VECTORS)]
        return [e.b.load(place, typ=wide, align=8) for place in places]

    low, high = bounds(first), bounds(last)

    def one(j: Any, highest: list[Any]) -> list[Any]:
        row = e.address(scores, e.b.mul(j, I64(PANEL)))
        here = e.b.insert_element(ir.Constant(wide, ir.Undefined), e.b.add(key, j), I32(0))
        here = e.b.shuffle_vector(here, here, ir.Constant(VI, [0] * LANES))
        values = []
        for v, value in enumerate(e.panel(row)):
            seen = e.b.and_(e.b.icmp_signed("<=", low[v], here), e.b.icmp_signed("<", here, high[v]))
            values.append(e.b.select(seen, value, fill))
        e.store_panel(values, row)
        return [e.maximum(value, old) for value, old in zip(values, highest, strict=True)]

    e.store_panel(e.loop(rows, e.panel(top), one), top)


# (scores, rows, key, first, last, top, fill): scores[j] = fill in the lanes that do not see the key `key` + j, those
# with first <= it < last (int64) do; top raised to the others.
hide_outside = kernel("iiiiiif", _emit_outside)


def _emit_weigh(e: Emit, mass: Any, step: Any, tiles: Any, weight: Any, total: Any) -> None:
    def tile(t: Any, sums: list[Any]) -> list[Any]:
        place = e.address(mass, e.b.mul(t, step))
        factors = e.panel(e.address(weight, e.b.mul(t, I64(PANEL))))
        values = [e.b.fmul(x, w) for x, w in zip(e.panel(place), factors, strict=True)]
        e.store_panel(values, place)
        return [e.b.fadd(s, x) for s, x in zip(sums, values, strict=True)]

    e.store_panel(e.loop(tiles, e.panel(total), tile), total)


# (mass, its row stride, tiles, weight, total): mass *= weight, and total += their sum.
weigh_tiles = kernel("iiiii", _emit_weigh)


def _cumulants(capped: bool) -> Any:
    def emit(
        e: Emit, first: Any, second: Any, groups: Any, critical: Any, log_size: Any, top: Any, *factors: Any
    ) -> None:
        linear, spread, inner, outer = (e.splat(factor) for factor in factors)
        half, zero = e.constant(0.5), e.constant(0.0)
        kind = ir.FunctionType(VF, [VF])
        root = cgutils.get_or_insert_function(e.b.module, kind, f"llvm.sqrt.v{LANES}f32")

        def step(g: Any, highest: list[Any]) -> list[Any]:
            offset = e.b.mul(g, I64(PANEL))
            row, variance = e.address(first, offset), e.address(second, offset)
            beyond, size = e.scalar(e.address(critical, g)), e.scalar(e.address(log_size, g))
            values = []
            for v, mean in enumerate(e.panel(row)):
                square = e.maximum(e.load(variance, v), zero)
                frozen = e.maximum(e.b.fsub(e.b.call(root, [square]), beyond), zero)
                cumulant = e.b.fmul(half, e.b.fsub(square, e.b.fmul(frozen, frozen)))
                score = e.multiply_add(mean, linear, e.b.fmul(cumulant, spread))
                if capped:
                    score = e.b.fmul(outer, e.tanh(e.b.fmul(inner, score)))
                values.append(e.b.fadd(score, size))
            e.store_panel(values, row)
            return [e.maximum(value, old) for value, old in zip(values, highest, strict=True)]

        e.store_panel(e.loop(groups, e.panel(top), step), top)

    return kernel("iiiiiiffff", emit)


# (first, second, groups, critical, log_size, top, linear, spread, inner, outer): with x = sqrt(second) and c = critical
# of the group, first = linear * first + spread * (x^2 - max(x - c, 0)^2) / 2, capped as outer * tanh(inner * .), plus
# log_size of the group; top raised. The bracket is the cumulant of `aat_hf.tiling.moments`: x^2 / 2 up to
# c = sqrt(2 ln n), its tangent c x - c^2 / 2 beyond.
cumulants, cumulants_capped = _cumulants(False), _cumulants(True)
