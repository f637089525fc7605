"""Micro-kernels of softmaxes over tiles, with exponentials to float32's precision or, for estimates, to 4 %."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations

from aat_hf.kernels.simd_emit import I64, PANEL, VECTORS, VF, VI, Emit, kernel

_ONE = float(1 << 23)  # a float's exponent counts from bit 23 on
# 2^x is (1 + f) 2^floor(x) times a factor between 0.94 and 1, f the fraction of x; lowered by this the mean error is 0.
_BIAS = (127 - 0.05753) * _ONE


def _exp2_rough(e: Emit, x: Any) -> Any:
    """2^x for x <= 127, 0 below 2^-126, by putting x into a float's exponent and mantissa (Schraudolph 1999).

    The error is between -4 % and +2 %, its mean over all fractions of x is 0.
    """
    bits = e.multiply_add(x, e.constant(_ONE), e.constant(_BIAS))
    normal = e.b.fcmp_ordered(">", bits, e.constant(_ONE))
    return e.b.bitcast(e.b.select(normal, e.b.fptosi(bits, VI), ir.Constant(VI, None)), VF)


def _totals(rough: bool) -> Any:
    def emit(e: Emit, scores: Any, rows: Any, tiles: Any, top: Any, mass: Any, step: Any, total: Any) -> None:
        highest, power = e.panel(top), _power(e, rough)

        def tile(t: Any, _: list[Any]) -> list[Any]:
            first = e.address(scores, e.b.mul(e.b.mul(t, rows), I64(PANEL)))

            def one(j: Any, sums: list[Any]) -> list[Any]:
                row = e.panel(e.address(first, e.b.mul(j, I64(PANEL))))
                return [e.b.fadd(s, power(e.b.fsub(x, m))) for s, x, m in zip(sums, row, highest, strict=True)]

            sums = e.loop(rows, [e.constant(0.0)] * VECTORS, one)
            e.store_panel(sums, e.address(total, e.b.mul(t, I64(PANEL))))
            e.store_panel(highest, e.address(mass, e.b.mul(t, step)))
            return []

        e.loop(tiles, [], tile)

    return kernel("iiiiiii", emit)


def _relative(rough: bool) -> Any:
    def emit(e: Emit, mass: Any, rows: Any, top: Any, total: Any) -> None:
        highest, power = e.panel(top), _power(e, rough)

        def one(j: Any, sums: list[Any]) -> list[Any]:
            row = e.address(mass, e.b.mul(j, I64(PANEL)))
            values = [power(e.b.fsub(x, m)) for x, m in zip(e.panel(row), highest, strict=True)]
            e.store_panel(values, row)
            return [e.b.fadd(s, x) for s, x in zip(sums, values, strict=True)]

        e.store_panel(e.loop(rows, e.panel(total), one), total)

    return kernel("iiii", emit)


def _power(e: Emit, rough: bool) -> Any:
    return (lambda x: _exp2_rough(e, x)) if rough else e.exp2


# (scores, rows, tiles, top, mass, its row stride, total): of each tile of so many rows, total = sum of 2^(score - top)
# and mass = top.
tile_totals, tile_totals_rough = _totals(False), _totals(True)
# (mass, rows, top, total): mass = 2^(mass - top), and total += their sum.
relative, relative_rough = _relative(False), _relative(True)
