"""Micro-kernel of a single query: products of rows with one vector, lanes along the head dimension."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba.core import cgutils

from aat_hf.kernels.simd_emit import F32, I64, LANES, POINTER, VF, Emit, kernel

_TOGETHER = 8  # rows whose sums are held at once: enough to hide the latency of a multiply-add


def _total(e: Emit, value: Any) -> Any:
    """Sum of the lanes, in any order."""
    kind = ir.FunctionType(F32, [F32, VF])
    function = cgutils.get_or_insert_function(e.b.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return e.b.call(function, [F32(0.0), value], fastmath=("reassoc",))


def _emit_dots(e: Emit, x: Any, step: Any, rows: Any, y: Any, vectors: Any, out: Any) -> None:
    def block(size: int, first: Any) -> None:
        places = [e.address(x, e.b.mul(e.b.add(first, I64(r)), step)) for r in range(size)]

        def add(i: Any, sums: list[Any]) -> list[Any]:
            offset = e.b.mul(i, I64(4 * LANES))
            here = e.load(e.b.add(y, offset))
            return [e.multiply_add(e.load(e.b.add(p, offset)), here, s) for p, s in zip(places, sums, strict=True)]

        for r, value in enumerate(e.loop(vectors, [e.constant(0.0)] * size, add)):
            place = e.address(out, e.b.add(first, I64(r)))
            e.b.store(_total(e, value), e.b.inttoptr(place, POINTER), align=4)

    done = I64(0)
    for size in (_TOGETHER, 1):
        count = e.b.sdiv(e.b.sub(rows, done), I64(size))
        with e.b.if_then(e.b.icmp_signed(">", count, I64(0))):
            start = done

            def one(i: Any, _: list[Any], size: int = size, start: Any = start) -> list[Any]:
                block(size, e.b.add(start, e.b.mul(i, I64(size))))
                return []

            e.loop(count, [], one)
        done = e.b.add(done, e.b.mul(count, I64(size)))


# (x, row stride, rows, y, vectors, out): out[r] = sum over the first vectors * LANES columns of x[r] y, vectors >= 1.
dots = kernel("iiiiii", _emit_dots)
