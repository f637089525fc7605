"""Torch's own OpenMP threads, for compiled loops: they are awake when torch has just used them.

GNU OpenMP's threads wait for work in a loop, for milliseconds: a second pool would share its cores with them. Torch
does not export its pool to Python, but it is that of the OpenMP library that torch is linked with, and a parallel
region entered from the thread that calls torch is run by the threads that run torch's. They run compiled code only:
waking Python in each of them would take longer than many a loop.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_SUFFIXES = (".so", ".dylib")
_INT = ir.IntType(32)


class Team:
    """Threads of torch's OpenMP library.

    A forked child does not have its parent's threads, and GNU OpenMP does not know: there are none for it.

    Attributes:
        enter: address of `GOMP_parallel(body, data, threads, flags)`; 0: there are no such threads.
    """

    def __init__(self) -> None:
        self.enter = _parallel_region()

    def leave(self) -> None:
        """Never enter a parallel region again."""
        self.enter = 0


def _parallel_region() -> int:
    """Address of `GOMP_parallel` in the library torch is linked with, or 0."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return 0
    found = [p for p in Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*") if p.suffix in _SUFFIXES]
    try:
        enter = ctypes.CDLL(str(found[0])).GOMP_parallel  # looked up in what it is linked with, too
    except (OSError, AttributeError, IndexError):
        return 0
    return ctypes.cast(enter, ctypes.c_void_p).value or 0


@intrinsic
def call_by_team(typing: Any, enter: Any, threads: Any, loop: Any, arguments: Any) -> Any:
    """Have the compiled `loop` called with a tuple of arguments by `threads` threads, this one among them, and wait.

    Args:
        enter: of a `Team`.

    Returns:
        whether one of them failed.
    """
    signature = loop.get_call_type(typing, arguments.types, {})
    compiled = loop.dispatcher.get_compile_result(signature)

    def generate(context: Any, builder: Any, _: Any, values: list[Any]) -> Any:
        address, count, _, packed = values
        context.active_code_library.add_linking_library(compiled.library)
        shared = cgutils.alloca_once(builder, ir.LiteralStructType([packed.type, _INT]))
        builder.store(packed, cgutils.gep_inbounds(builder, shared, 0, 0))
        failed = cgutils.gep_inbounds(builder, shared, 0, 1)
        builder.store(_INT(0), failed)
        body = _body(context, builder.module, compiled, shared.type, arguments)
        region = ir.FunctionType(ir.VoidType(), [body.type, shared.type, _INT, _INT]).as_pointer()
        builder.call(builder.inttoptr(address, region), [body, shared, builder.trunc(count, _INT), _INT(0)])
        return builder.icmp_signed("!=", builder.load(failed), _INT(0))

    return types.boolean(enter, threads, loop, arguments), generate


def _body(context: Any, module: Any, compiled: Any, kind: Any, arguments: Any) -> Any:
    """What each thread calls: the compiled loop, with the arguments that it finds behind a pointer of this kind."""
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind]), module.get_unique_name("body"))
    body.linkage = "internal"
    builder, shared = ir.IRBuilder(body.append_basic_block("entry")), body.args[0]
    values = cgutils.unpack_tuple(builder, builder.load(cgutils.gep_inbounds(builder, shared, 0, 0)))
    loop = context.declare_function(module, compiled.fndesc)
    status, _ = context.call_conv.call_function(builder, loop, compiled.signature.return_type, arguments.types, values)
    with builder.if_then(status.is_error):
        builder.store(_INT(1), cgutils.gep_inbounds(builder, shared, 0, 1))
    builder.ret_void()
    return body


team = Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.leave)
