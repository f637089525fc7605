"""Vector widths of the processor, and the vector operations that the micro-kernels emit as LLVM IR."""

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

F32, I32, I64, POINTER = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.PointerType()


def _vector_lanes() -> int:
    """Floats in the widest vector register of the processor numba compiles for: asked of LLVM itself.

    A sum of 16 floats is compiled and the registers it uses are read off, so NUMBA_CPU_NAME and NUMBA_CPU_FEATURES
    count, and numba's cache index, which holds both, always matches the width of the code.
    """
    module, wide = ir.Module(), ir.VectorType(F32, 16)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), "probe")
    builder = ir.IRBuilder(function.append_basic_block())
    value = builder.load(function.args[0], typ=wide, align=4)
    builder.store(builder.fadd(value, value), function.args[0], align=4)
    builder.ret_void()
    _, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(cpu=cpu, features=features)
    assembly = machine.emit_assembly(llvm.parse_assembly(str(module)))
    return 16 if "zmm" in assembly else 8 if "ymm" in assembly else 4


LANES = _vector_lanes()
VECTORS = 2  # vectors of a panel: two per broadcast scalar, so that loads do not outnumber multiply-adds
PANEL = VECTORS * LANES
ROWS, FEW = {16: (8, 4), 8: (6, 4), 4: (6, 4)}[LANES]  # ROWS * VECTORS sums, the operands and a scalar fill registers
LOWEST = np.float32(-1e30)  # running maximum of a row that has seen no key
MASKED = np.float32(-3e38)  # score of a forbidden key: 2^(MASKED - LOWEST) is 0

VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VB = ir.VectorType(ir.IntType(8), LANES)
MAGIC = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer that sits in the low bits
# Minimax polynomial of 2^f on [-1/2, 1/2], relative error 2e-9.
_EXP2 = (1.534581197e-4, 1.339993138e-3, 9.618488959e-3, 5.550328777e-2, 2.402264689e-1, 6.931472057e-1, 1.0)
# Rational minimax x p(x^2) / q(x^2) of tanh on [-7.9, 7.9], from Eigen.
_TANH_END = 7.90531110763549805
_TANH_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
           1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


class Emit:
    """The few vector operations the micro-kernels are made of, written to an LLVM builder."""

    def __init__(self, builder: Any) -> None:
        self.b = builder

    def address(self, base: Any, elements: Any) -> Any:
        """Address of float `elements` after `base`."""
        return self.b.add(base, self.b.shl(elements, I64(2)))

    def load(self, address: Any, vector: int = 0) -> Any:
        """Vector number `vector` at `address`."""
        place = self.b.add(address, I64(4 * LANES * vector))
        return self.b.load(self.b.inttoptr(place, POINTER), typ=VF, align=4)

    def panel(self, address: Any) -> list[Any]:
        """The vectors of a panel's row."""
        return [self.load(address, v) for v in range(VECTORS)]

    def store(self, value: Any, address: Any, vector: int = 0) -> None:
        """Write vector number `vector` at `address`."""
        place = self.b.add(address, I64(4 * LANES * vector))
        self.b.store(value, self.b.inttoptr(place, POINTER), align=4)

    def store_panel(self, values: list[Any], address: Any) -> None:
        """Write the vectors of a panel's row."""
        for v, value in enumerate(values):
            self.store(value, address, v)

    def scalar(self, address: Any) -> Any:
        """One float, in all lanes."""
        return self.splat(self.b.load(self.b.inttoptr(address, POINTER), typ=F32, align=4))

    def splat(self, value: Any) -> Any:
        """`value` in all lanes."""
        undefined = ir.Constant(VF, ir.Undefined)
        first = self.b.insert_element(undefined, value, I32(0))
        return self.b.shuffle_vector(first, undefined, ir.Constant(VI, [0] * LANES))

    def constant(self, value: float) -> Any:
        """A number, rounded to float32, in all lanes."""
        return ir.Constant(VF, [float(np.float32(value))] * LANES)

    def multiply_add(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, fused where the processor can."""
        kind = ir.FunctionType(VF, [VF] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, kind, f"llvm.fmuladd.v{LANES}f32"), [x, y, z])

    def maximum(self, x: Any, y: Any) -> Any:
        """The greater of two, lane by lane; y where x is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", x, y), x, y)

    def polynomial(self, coefficients: tuple[float, ...], x: Any) -> Any:
        """Horner's rule, highest power first."""
        value = self.constant(coefficients[0])
        for c in coefficients[1:]:
            value = self.multiply_add(value, x, self.constant(c))
        return value

    def exp2(self, x: Any) -> Any:
        """2^x for x <= 127, 0 below 2^-120: a denormal here would make every later product slow."""
        b, magic = self.b, self.constant(MAGIC)
        x = self.maximum(x, self.constant(-126.0))
        rounded = b.fadd(x, magic)
        power = self.polynomial(_EXP2, b.fsub(x, b.fsub(rounded, magic)))
        exponent = b.shl(b.bitcast(rounded, VI), ir.Constant(VI, [23] * LANES))
        value = b.bitcast(b.add(b.bitcast(power, VI), exponent), VF)
        return b.select(b.fcmp_ordered(">", rounded, self.constant(MAGIC - 120)), value, self.constant(0.0))

    def tanh(self, x: Any) -> Any:
        """tanh to float32's precision, without a branch."""
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
        index = b.phi(I64)
        index.add_incoming(I64(0), before)
        values = [b.phi(value.type) for value in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        following = b.add(index, I64(1))
        index.add_incoming(following, b.block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, b.block)
        b.cbranch(b.icmp_signed("<", following, count), inside, after)
        b.position_at_end(after)
        return results

    def blocks(self, rows: Any, block: Callable[[Any, int], None]) -> None:
        """`block(first, size)` for all `rows`: as many at a time as fill the registers, then fewer, then one by one."""
        done = I64(0)
        for size in (ROWS, FEW, 1):
            count = self.b.sdiv(self.b.sub(rows, done), I64(size))
            with self.b.if_then(self.b.icmp_signed(">", count, I64(0))):
                start = done

                def one(i: Any, _: list[Any], size: int = size, start: Any = start) -> list[Any]:
                    block(self.b.add(start, self.b.mul(i, I64(size))), size)
                    return []

                self.loop(count, [], one)
            done = self.b.add(done, self.b.mul(count, I64(size)))


def kernel(arguments: str, emit: Callable[..., None]) -> Any:
    """A numba intrinsic without result; `arguments` holds "i" for an integer or address and "f" for a float each."""
    kinds = [types.intp if kind == "i" else types.float32 for kind in arguments]

    def generate(context: Any, builder: Any, signature: Any, values: list[Any]) -> Any:
        emit(Emit(builder), *values)
        return context.get_dummy_value()

    def typed(typing: Any, *arguments: Any) -> Any:
        return types.void(*kinds), generate

    # numba binds the arguments of an intrinsic one by one, so it must not see "*arguments".
    names = ["typing", *(f"argument{i}" for i in range(len(kinds)))]
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any function may have one
    return intrinsic(typed)
