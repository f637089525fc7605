"""Micro-kernel of the tile prediction: second-order scores of groups of keys, one panel of queries at a time."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils

from aat_hf.kernels.simd_emit import I64, LANES, PANEL, VF, Emit, kernel


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
