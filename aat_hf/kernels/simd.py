"""Micro-kernels of the CPU kernel: numba intrinsics that emit LLVM vector IR for the host's vector width.

Every matrix is float32 and passed by address (an integer) and row stride (in elements). A *panel* is `PANEL` queries
side by side in vector lanes: a panel of an (n, PANEL) matrix has row stride PANEL. The products keep a block of
`ROWS` x `PANEL` sums in registers and read the other operand one scalar at a time, broadcast to all lanes; blocks of
`FEW` rows and of one row do the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]  # llvmlite has no annotations
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

_F32, _I32, _I64, _POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()


def _vector_lanes() -> int:
    """Floats in the widest vector register of the processor numba compiles for: asked of LLVM itself.

    A sum of 16 floats is compiled and the registers it uses are read off, so NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
    count, and numba's cache index, which holds both, always matches the width of the code.
    """
    module, wide = ir.Module(), ir.VectorType(_F32, 16)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_POINTER]), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.load(function.args[0], typ=wide, align=4)
    builder.store(builder.fadd(value, value), function.args[0], align=4)
    builder.ret_void()
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    return 16 if "zmm" in assembly else 8 if "ymm" in assembly else 4


LANES = _vector_lanes()
_VECTORS = 2  # vectors of a panel: two per broadcast scalar, so that loads do not outnumber multiply-adds
PANEL = _VECTORS * LANES
ROWS, FEW = {16: (8, 4), 8: (6, 4), 4: (6, 4)}[LANES]  # ROWS * _VECTORS sums, the operands and a scalar fill registers
LOWEST = np.float32(-1e30)  # running maximum of a row that has seen no key
MASKED = np.float32(-3e38)  # score of a forbidden key: 2^(MASKED - LOWEST) is 0

_VF, _VI = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)
_VB = ir.VectorType(ir.IntType(8), LANES)
_MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
# Minimax polynomial of 2^f on [-1/2, 1/2], relative error 2e-9.
_EXP2 = (1.534581197e-4, 1.339993138e-3, 9.618488959e-3, 5.550328777e-2, 2.402264689e-1, 6.931472057e-1, 1.0)
# Rational minimax x p(x^2) / q(x^2) of tanh on [-7.9, 7.9], from Eigen.
_TANH_END = 7.90531110763549805
_TANH_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
           1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


class _Emit:
    """The few vector operations the micro-kernels are made of, written to an LLVM builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def address(self, base: Any, elements: Any) -> Any:
        """Address of float `elements` after `base`."""
        return self.b.add(base, self.b.shl(elements, _I64(2)))

    def load(self, address: Any, vector: int = 0) -> Any:
        """Vector number `vector` at `address`."""
        place = self.b.add(address, _I64(4 * LANES * vector))
        return self.b.load(self.b.inttoptr(place, _POINTER), typ=_VF, align=4)

    def panel(self, address: Any) -> list[Any]:
        """The vectors of a panel's row."""
        return [self.load(address, v) for v in range(_VECTORS)]

    def store(self, value: Any, address: Any, vector: int = 0) -> None:
        place = self.b.add(address, _I64(4 * LANES * vector))
        self.b.store(value, self.b.inttoptr(place, _POINTER), align=4)

    def store_panel(self, values: list[Any], address: Any) -> None:
        for v, value in enumerate(values):
            self.store(value, address, v)

    def scalar(self, address: Any) -> Any:
        """One float, in all lanes."""
        return self.splat(self.b.load(self.b.inttoptr(address, _POINTER), typ=_F32, align=4))

    def splat(self, value: Any) -> Any:
        undefined = ir.Constant(_VF, ir.Undefined)
        first = self.b.insert_element(undefined, value, _I32(0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(_VI, [0] * LANES))

    def constant(self, value: float) -> Any:
        return ir.Constant(_VF, [float(np.float32(value))] * LANES)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, fused where the processor can."""
        kind = ir.FunctionType(_VF, [_VF] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{LANES}f32"), [x, y, z])

    def maximum(self, x: Any, y: Any) -> Any:
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def polynomial(self, coefficients: tuple[float, ...], x: Any) -> Any:
        """Horner's rule, highest power first."""
        value = self.constant(coefficients[0])
        for c in coefficients[1:]:
            value = self.multiply_add(value, x, self.constant(c))
        return value

    def exp2(self, x: Any) -> Any:
        """2^x for x <= 127, 0 below 2^-120: a denormal here would make every later product slow."""
        b, magic = self.b, self.constant(_MAGIC)
        x = self.maximum(x, self.constant(-126.0))
        rounded = b.fadd(x, magic)
        power = self.polynomial(_EXP2, b.fsub(x, b.fsub(rounded, magic)))
        exponent = b.shl(b.bitcast(rounded, _VI), ir.Constant(_VI, [23] * LANES))
        value = b.bitcast(b.add(b.bitcast(power, _VI), exponent), _VF)
        return b.select(b.fcmp_ordered(">", rounded, self.constant(_MAGIC - 120)), value, self.constant(0.0))

    def tanh(self, x: Any) -> Any:
        end = self.constant(_TANH_END)
        x = self.maximum(x, self.constant(-_TANH_END))
        x = self.b.select(self.b.fcmp_ordered("<", x, end), x, end)
        square = self.b.fmul(x, x)
        return self.b.fdiv(self.b.fmul(x, self.polynomial(_TANH_P, square)), self.polynomial(_TANH_Q, square))

    def loop(self, count: Any, carried: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """`for i in range(count): carried = body(i, carried)`, at least once."""
        b, before = self.b, self.b.block
        inside, after = b.append_basic_block("loop"), b.append_basic_block("done")
        b.branch(inside)
        b.position_at_end(inside)
        index = b.phi(_I64)
        index.add_incoming(_I64(0), before)
        values = [b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        following = b.add(index, _I64(1))
        index.add_incoming(following, b.block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, count), inside, after)
        b.position_at_end(after)
        return results


def _kernel(arguments: str, emit: Callable[..., None]) -> Any:
    """A numba intrinsic without result; `arguments` holds "i" for an integer or address and "f" for a float each."""
    kinds = [types.intp if kind == "i" else types.float32 for kind in arguments]

    def generate(context: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        emit(_Emit(builder), *values)
        return context.get_dummy_value()

    def kernel(typing: Any, *arguments: Any) -> Any:
        return types.void(*kinds), generate

    # numba binds the arguments of an intrinsic one by one, so it must not see "*arguments".
    names = ["typing", *(f"argument{i}" for i in range(len(kinds)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    kernel.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function may have one
    return intrinsic(kernel)


def _product(by_row: bool, start: str = "zero", top: bool = False) -> Any:
    """C (rows, PANEL) = start + A B, summed over `depth`.

    Arguments: A, A's row stride, rows, B (depth, PANEL), B's row stride, C, C's row stride, depth, and the address of
    one more panel row: the factor of C with start "scaled", the running maximum to update with `top`.

    Args:
        by_row: A is (rows, depth); otherwise it is stored transposed, (depth, rows).
        start: "zero", "sum" (add to C) or "scaled" (add to C times a factor per lane).
        top: also raise the running maximum of each lane to the results.
    """

    def block(e: _Emit, size: int, first: Any, a: Any, a_step: Any, b: Any, b_step: Any, c: Any, c_step: Any,
              depth: Any, extra: Any) -> None:  # fmt: skip
        step_row, step_depth = (a_step, _I64(1)) if by_row else (_I64(1), a_step)
        c_rows = [e.address(c, e.b.mul(e.b.add(first, _I64(r)), c_step)) for r in range(size)]
        a_rows = [e.address(a, e.b.mul(e.b.add(first, _I64(r)), step_row)) for r in range(size)]
        if start == "zero":
            sums = [e.constant(0.0)] * (size * _VECTORS)
        else:
            sums = [value for row in c_rows for value in e.panel(row)]
        if start == "scaled":
            factor = e.panel(extra)
            sums = [e.b.fmul(value, factor[i % _VECTORS]) for i, value in enumerate(sums)]

        def step(k: Any, sums: list[Any]) -> list[Any]:
            lanes = e.panel(e.address(b, e.b.mul(k, b_step)))
            offset = e.b.shl(e.b.mul(k, step_depth), _I64(2))
            scalars = [e.scalar(e.b.add(row, offset)) for row in a_rows]
            return [e.multiply_add(scalars[i // _VECTORS], lanes[i % _VECTORS], x) for i, x in enumerate(sums)]

        sums = e.loop(depth, sums, step)
        highest = e.panel(extra) if top else []
        for r, row in enumerate(c_rows):
            e.store_panel(sums[r * _VECTORS : (r + 1) * _VECTORS], row)
            highest = [e.maximum(sums[r * _VECTORS + v], old) for v, old in enumerate(highest)]
        if top:
            e.store_panel(highest, extra)

    def emit(e: _Emit, a: Any, a_step: Any, rows: Any, *others: Any) -> None:
        done = _I64(0)
        for size in (ROWS, FEW, 1):
            count = e.b.sdiv(e.b.sub(rows, done), _I64(size))
            with e.b.if_then(e.b.icmp_signed(">", count, _I64(0))):
                start_row = done

                def one(i: Any, _: list[Any], size: int = size, start_row: Any = start_row) -> list[Any]:
                    block(e, size, e.b.add(start_row, e.b.mul(i, _I64(size))), a, a_step, *others)
                    return []

                e.loop(count, [], one)
            done = e.b.add(done, e.b.mul(count, _I64(size)))

    return _kernel("i" * 9, emit)


scores = _product(True)  # K Q^T, a row per key
scores_top = _product(True, top=True)  # ... and each query's maximum
add_product = _product(True, "sum")  # dV += P dO and dK += dS Q, lanes along the head dimension
mix_product = _product(False, "scaled")  # O^T = O^T * rescale + V^T P and dQ^T += K^T dS


def _panel_rows(e: _Emit, x: Any, step: Any, rows: Any, top: Any, change: Callable[..., Any]) -> None:
    """x[j] = change(j, v, vector v of x[j]) in each row, and `top` raised to the results."""

    def one(j: Any, highest: list[Any]) -> list[Any]:
        row = e.address(x, e.b.mul(j, step))
        values = [change(j, v, value) for v, value in enumerate(e.panel(row))]
        e.store_panel(values, row)
        return [e.maximum(value, old) for value, old in zip(values, highest, strict=True)]

    e.store_panel(e.loop(rows, e.panel(top), one), top)


def _emit_cap(e: _Emit, scores: Any, rows: Any, top: Any, inner: Any, outer: Any) -> None:
    inner, outer = e.splat(inner), e.splat(outer)
    _panel_rows(e, scores, _I64(PANEL), rows, top, lambda j, v, x: e.b.fmul(outer, e.tanh(e.b.fmul(inner, x))))


def _emit_mask(e: _Emit, x: Any, step_x: Any, rows: Any, allowed: Any, step_allowed: Any, top: Any, fill: Any) -> None:
    fill = e.splat(fill)

    def change(j: Any, v: int, value: Any) -> Any:
        place = e.b.add(allowed, e.b.add(e.b.mul(j, step_allowed), _I64(v * LANES)))
        seen = e.b.load(e.b.inttoptr(place, _POINTER), typ=_VB, align=1)
        return e.b.select(e.b.icmp_unsigned("!=", seen, ir.Constant(_VB, [0] * LANES)), value, fill)

    _panel_rows(e, x, step_x, rows, top, change)


def _emit_softmax(e: _Emit, scores: Any, rows: Any, top: Any, new_top: Any, total: Any, rescale: Any) -> None:
    highest = e.panel(new_top)
    factor = [e.exp2(e.b.fsub(old, new)) for old, new in zip(e.panel(top), highest, strict=True)]

    def step(j: Any, sums: list[Any]) -> list[Any]:
        row = e.address(scores, e.b.mul(j, _I64(PANEL)))
        weights = [e.exp2(e.b.fsub(x, m)) for x, m in zip(e.panel(row), highest, strict=True)]
        e.store_panel(weights, row)
        return [e.b.fadd(s, w) for s, w in zip(sums, weights, strict=True)]

    sums = e.loop(rows, [e.constant(0.0)] * _VECTORS, step)
    before = e.panel(total)
    e.store_panel([e.multiply_add(t, f, s) for t, f, s in zip(before, factor, sums, strict=True)], total)
    e.store_panel(highest, top)
    e.store_panel(factor, rescale)


def _gradient(capped: bool) -> Any:
    def emit(e: _Emit, p: Any, ds: Any, step_row: Any, rows: Any, lse: Any, delta: Any, *factors: Any) -> None:
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

    return _kernel("iiiiiifff", emit)


# (scores, rows, top, inner, outer): scores = outer * tanh(inner * scores); top raised to their maximum.
cap_scores = _kernel("iiiff", _emit_cap)
# (x, row stride, rows, allowed, its row stride in bytes, top, fill): x = fill where the byte is 0; top raised.
mask_panel = _kernel("iiiiiif", _emit_mask)
# (scores, rows, top, new_top, total, rescale): rescale = 2^(top - new_top), top = new_top, scores = 2^(scores - top)
# and total = total * rescale + their sum.
soften = _kernel("iiiiii", _emit_softmax)
# (p, ds, row stride, rows, lse, delta, scale, inner, outer): from scores in p and dP in ds to P = 2^(p - lse) and
# dS = scale * P * (dP - delta), one panel of both; `capped` first caps the scores as `cap_scores` does.
gradient, gradient_capped = _gradient(False), _gradient(True)


@intrinsic
def take_number(typing: Any, counter: Any) -> Any:
    """Add 1 to the int64 at address `counter`, atomically, and return what it was: the queue of work items."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _POINTER), _I64(1), "monotonic")

    return types.int64(types.intp), generate
