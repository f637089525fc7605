"""Micro-kernel of the moments of a group of rows."""

from __future__ import annotations

from typing import Any

from aat_hf.kernels.simd_emit import F32, I64, LANES, Emit, kernel


def _emit_moments(e: Emit, x: Any, vectors: Any, rows: Any, mean: Any, variance: Any) -> None:
    step, count = e.b.mul(vectors, I64(LANES)), e.splat(e.b.sitofp(rows, F32))

    def column(v: Any, _: list[Any]) -> list[Any]:
        place = e.b.mul(v, I64(LANES))
        first = e.address(x, place)

        def value(row: Any) -> Any:
            return e.load(e.address(first, e.b.mul(row, step)))

        total = e.loop(rows, [e.constant(0.0)], lambda row, sums: [e.b.fadd(sums[0], value(row))])[0]
        centre = e.b.fdiv(total, count)

        def spread(row: Any, sums: list[Any]) -> list[Any]:
            away = e.b.fsub(value(row), centre)
            return [e.multiply_add(away, away, sums[0])]

        e.store(centre, e.address(mean, place))
        e.store(e.b.fdiv(e.loop(rows, [e.constant(0.0)], spread)[0], count), e.address(variance, place))
        return []

    e.loop(vectors, [], column)


# (x, vectors, rows, mean, variance): of each column of the rows of x (rows, vectors * LANES), one row at least.
row_moments = kernel("iiiii", _emit_moments)
