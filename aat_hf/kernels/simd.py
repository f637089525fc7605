"""Micro-kernels of the CPU kernel: numba intrinsics that emit LLVM vector IR for the host's vector width.

Every matrix is float32 and passed by address (an integer) and row stride (in elements). A *panel* is `PANEL` queries
side by side in vector lanes: a panel of an (n, PANEL) matrix has row stride PANEL. The products keep a block of
`ROWS` x `PANEL` sums in registers and read the other operand one scalar at a time, broadcast to all lanes; blocks of
`FEW` rows and of one row do the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from aat_hf.kernels.simd_emit import I32, I64, LANES, PANEL, POINTER, VB, VECTORS, Emit, kernel


def _product(by_row: bool, start: str = "zero", top: bool = False) -> Any:
    """C (rows, PANEL) = start + A B, summed over `depth`.

    Arguments: A, A's row stride, rows, B (depth, PANEL), B's row stride, C, C's row stride, depth, and the address of
    one more panel row: the factor of C with start "scaled", the running maximum to update with `top`.

    Args:
        by_row: A is (rows, depth); otherwise it is stored transposed, (depth, rows).
        start: "zero", "sum" (add to C) or "scaled" (add to C times a factor per lane).
        top: also raise the running maximum of each lane to the results.
    """

    def block(e: Emit, size: int, first: Any, a: Any, a_step: Any, b: Any, b_step: Any, c: Any, c_step: Any,
              depth: Any, extra: Any) -> None:  # fmt: skip
        step_row, step_depth = (a_step, I64(1)) if by_row else (I64(1), a_step)
        c_rows = [e.address(c, e.b.mul(e.b.add(first, I64(r)), c_step)) for r in range(size)]
        a_rows = [e.address(a, e.b.mul(e.b.add(first, I64(r)), step_row)) for r in range(size)]
        if start == "zero":
            sums = [e.constant(0.0)] * (size * VECTORS)
        else:
            sums = [value for row in c_rows for value in e.panel(row)]
        if start == "scaled":
            factor = e.panel(extra)
            sums = [e.b.fmul(value, factor[i % VECTORS]) for i, value in enumerate(sums)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            lanes = e.panel(e.address(b, e.b.mul(k, b_step)))
            offset = e.b.shl(e.b.mul(k, step_depth), I64(2))
            scalars = [e.scalar(e.b.add(row, offset)) for row in a_rows]
            return [e.multiply_add(scalars[i // VECTORS], lanes[i % VECTORS], x) for i, x in enumerate(sums)]

        sums = e.loop(depth, sums, step)
        highest = e.panel(extra) if top else []
        for r, row in enumerate(c_rows):
            e.store_panel(sums[r * VECTORS : (r + 1) * VECTORS], row)
            highest = [e.maximum(sums[r * VECTORS + v], old) for v, old in enumerate(highest)]
        if top:
            e.store_panel(highest, extra)

    def emit(e: Emit, a: Any, a_step: Any, rows: Any, *others: Any) -> None:
        e.blocks(rows, lambda first, size: block(e, size, first, a, a_step, *others))

    return kernel("i" * 9, emit)


scores = _product(True)  # K Q^T, a row per key
scores_top = _product(True, top=True)  # ... and each query's maximum
add_product = _product(True, "sum")  # dV += P dO and dK += dS Q, lanes along the head dimension
mix_product = _product(False, "scaled")  # O^T = O^T * rescale + V^T P and dQ^T += K^T dS


def _panel_rows(e: Emit, x: Any, step: Any, rows: Any, top: Any, change: Callable[..., Any]) -> None:
    """x[j] = change(j, v, vector v of x[j]) in each row, and `top` raised to the results."""

    def one(j: Any, highest: list[Any]) -> list[Any]:
        row = e.address(x, e.b.mul(j, step))
        values = [change(j, v, value) for v, value in enumerate(e.panel(row))]
        e.store_panel(values, row)
        return [e.maximum(value, old) for value, old in zip(values, highest, strict=True)]

    e.store_panel(e.loop(rows, e.panel(top), one), top)


def _emit_cap(e: Emit, scores: Any, rows: Any, top: Any, inner: Any, outer: Any) -> None:
    inner, outer = e.splat(inner), e.splat(outer)
    _panel_rows(e, scores, I64(PANEL), rows, top, lambda j, v, x: e.b.fmul(outer, e.tanh(e.b.fmul(inner, x))))


def _emit_mask(e: Emit, x: Any, step_x: Any, rows: Any, allowed: Any, step_allowed: Any, top: Any, fill: Any) -> None:
    fill = e.splat(fill)

    def change(j: Any, v: int, value: Any) -> Any:
        place = e.b.add(allowed, e.b.add(e.b.mul(j, step_allowed), I64(v * LANES)))
        seen = e.b.load(e.b.inttoptr(place, POINTER), typ=VB, align=1)
        return e.b.select(e.b.icmp_unsigned("!=", seen, ir.Constant(VB, [0] * LANES)), value, fill)

    _panel_rows(e, x, step_x, rows, top, change)


def _emit_softmax(e: Emit, scores: Any, rows: Any, top: Any, new_top: Any, total: Any, rescale: Any) -> None:
    highest = e.panel(new_top)
    factor = [e.exp2(e.b.fsub(old, new)) for old, new in zip(e.panel(top), highest, strict=True)]

    def step(j: Any, sums: list[Any]) -> list[Any]:
        row = e.address(scores, e.b.mul(j, I64(PANEL)))
        weights = [e.exp2(e.b.fsub(x, m)) for x, m in zip(e.panel(row), highest, strict=True)]
        e.store_panel(weights, row)
        return [e.b.fadd(s, w) for s, w in zip(sums, weights, strict=True)]

    sums = e.loop(rows, [e.constant(0.0)] * VECTORS, step)
    before = e.panel(total)
    e.store_panel([e.multiply_add(t, f, s) for t, f, s in zip(before, factor, sums, strict=True)], total)
    e.store_panel(highest, top)
    e.store_panel(factor, rescale)


def _gradient(capped: bool) -> Any:
    def emit(e: Emit, p: Any, ds: Any, step_row: Any, rows: Any, lse: Any, delta: Any, *factors: Any) -> None:
        lse, delta = e.panel(lse), e.panel(delta)
        scale, inner, outer = (e.splat(factor) for factor in factors)

        def step(j: Any, _: list[Any]) -> list[Any]:
            offset = e.b.mul(j, step_row)
            p_row, ds_row = e.address(p, offset), e.address(ds, offset)
            for v, score in enumerate(e.panel(p_row)):
                slope = scale
                if capped:
                    bent = e.tanh(e.b.fmul(inner, score))
                    score = e.b.fmul(outer, bent)
                    slope = e.b.fmul(slope, e.b.fsub(e.constant(1.0), e.b.fmul(bent, bent)))
                weight = e.exp2(e.b.fsub(score, lse[v]))
                e.store(weight, p_row, v)
                e.store(e.b.fmul(e.b.fmul(weight, slope), e.b.fsub(e.load(ds_row, v), delta[v])), ds_row, v)
            return []

        e.loop(rows, [], step)

    return kernel("iiiiiifff", emit)


# (scores, rows, top, inner, outer): scores = outer * tanh(inner * scores); top raised to their maximum.
cap_scores = kernel("iiiff", _emit_cap)
# (x, row stride, rows, allowed, its row stride in bytes, top, fill): x = fill where the byte is 0; top raised.
mask_panel = kernel("iiiiiif", _emit_mask)
# (scores, rows, top, new_top, total, rescale): rescale = 2^(top - new_top), top = new_top, scores = 2^(scores - top)
# and total = total * rescale + their sum.
soften = kernel("iiiiii", _emit_softmax)
# (p, ds, row stride, rows, lse, delta, scale, inner, outer): from scores in p and dP in ds to P = 2^(p - lse) and
# dS = scale * P * (dP - delta), one panel of both; `capped` first caps the scores as `cap_scores` does.
gradient, gradient_capped = _gradient(False), _gradient(True)


def _emit_prefetch(e: Emit, address: Any, lines: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [POINTER, I32, I32, I32])
    function = cgutils.get_or_insert_function(e.b.module, kind, "llvm.prefetch.p0")

    def one(i: Any, _: list[Any]) -> list[Any]:
        place = e.b.inttoptr(e.b.add(address, e.b.shl(i, I64(6))), POINTER)
        e.b.call(function, [place, I32(0), I32(3), I32(1)])
        return []

    e.loop(lines, [], one)


# (address, lines): so many cache lines of 64 bytes, one at least, are brought near.
prefetch = kernel("ii", _emit_prefetch)


@intrinsic
def take_number(typing: Any, counter: Any) -> Any:
    """Add 1 to the int64 at address `counter`, atomically, and return what it was: the queue of work items."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], POINTER), I64(1), "monotonic")

    return types.int64(types.intp), generate
