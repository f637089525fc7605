"""Arrays without owners for compiled loops, which then count no references.

numba counts the references to the memory of an array atomically, whenever one is passed on, sliced or put into a tuple.
Threads that share an array take turns at its counter; that cost a fifth of the measured rows' time in one thread and
more in two. The caller of a loop holds its arrays until it ends, so inside nobody needs to count.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def borrowed(typing: Any, x: Any) -> Any:
    """`x`, an array or a tuple of such and numbers, without owners: somebody else has to `hold` it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _without_owner(context, builder, x, arguments[0])

    return x(x), generate


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = [builder.extract_value(value, i) for i in range(len(kind))]
        return context.make_tuple(
            builder, kind, [_without_owner(context, builder, *part) for part in zip(kind, parts, strict=True)]
        )
    return value


@intrinsic
def hold(typing: Any, x: Any) -> Any:
    """Nothing, but a use of `x`: its memory is not freed before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.void(x), generate
