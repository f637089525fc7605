"""Micro-kernels between rows and panels: transposed blocks of LANES x LANES floats, and sums of rows."""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]  # llvmlite has no annotations

from aat_hf.kernels.simd_emit import I64, LANES, VI, Emit, kernel


def _shuffled(e: Emit, a: Any, b: Any, width: int) -> tuple[Any, Any]:
    """The 2 x 2 blocks of `width` lanes of two rows transposed."""
    first = [i + LANES - width if i & width else i for i in range(LANES)]
    second = [i + LANES if i & width else i + width for i in range(LANES)]
    return e.b.shuffle_vector(a, b, ir.Constant(VI, first)), e.b.shuffle_vector(a, b, ir.Constant(VI, second))


def _transposed(each: bool) -> Any:
    def emit(e: Emit, x: Any, step: Any, out: Any, out_step: Any, factor: Any) -> None:
        factors = e.load(factor) if each else e.splat(factor)
        rows = [e.b.fmul(e.load(e.address(x, e.b.mul(I64(r), step))), factors) for r in range(LANES)]
        width = 1
        while width < LANES:
            for r in range(LANES):
                if not r & width:
                    rows[r], rows[r + width] = _shuffled(e, rows[r], rows[r + width], width)
            width *= 2
        for r, row in enumerate(rows):
            e.store(row, e.address(out, e.b.mul(I64(r), out_step)))

    return kernel("iiiii" if each else "iiiif", emit)


# (x, row stride, out, row stride, factor): out[j, i] = factor x[i, j] for a block of LANES x LANES.
transpose = _transposed(False)
# ... or factor[j] x[i, j], its address given.
transpose_each = _transposed(True)


def _emit_add(e: Emit, x: Any, rows: Any, out: Any) -> None:
    def one(r: Any, sums: list[Any]) -> list[Any]:
        return [e.b.fadd(sums[0], e.load(e.address(x, e.b.mul(r, I64(LANES)))))]

    e.store(e.loop(rows, [e.load(out)], one)[0], out)


# (x, rows, out): out (LANES,) += the sum of the rows of x (rows, LANES).
add_rows = kernel("iii", _emit_add)
