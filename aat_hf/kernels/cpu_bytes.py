"""Rows rounded to 8 bits, for estimates: of keys and of their moments as a whole, of queries a panel at a time."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Floats, Matrix, Numbers, aligned, entry, jit, load
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_emit import PANEL

_STEPS, _OFFSET = np.float32(127), 128
_BLOCK = 256  # rows of a work item
_TINY = np.float32(1e-30)


class ByteRows(NamedTuple):
    """Rows of `bytes` / 4 words: scale[i] * (bytes[i] - 128) is row i, rounded. Without elements: not in use.

    Attributes:
        bytes: (rows, dim rounded up to a multiple of 4) uint8.
        scale: (rows,) float32.
    """

    bytes: NDArray[np.uint8]
    scale: Floats


class BytePanel(NamedTuple):
    """A panel of rows: scale[i] * its bytes is row i, rounded.

    Attributes:
        words: (words * PANEL,) int32, four signed bytes of a row each.
        scale, inverse: (PANEL,) float32; shift: (PANEL,) int32, 128 times the sum of the row's bytes.
    """

    words: NDArray[np.int32]
    scale: Floats
    inverse: Floats
    shift: NDArray[np.int32]


NO_BYTES = ByteRows(np.empty((0, 0), np.uint8), np.empty(0, np.float32))


def byte_rows(x: Matrix) -> ByteRows:
    """Round every row."""
    rows, dim = (x.bits if x.kind else x.wide).shape
    found = ByteRows(np.empty((rows, -(-dim // 4) * 4), np.uint8), np.empty(rows, np.float32))
    run(round_rows, 8 * rows * dim, x, found)
    return found


@jit
def _largest(x: Floats) -> np.float32:
    """The largest absolute value, found among the bits, which are in the same order: a maximum in vectors."""
    bits, largest = x.view(np.int32), np.int32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.int32(0x7FFFFFFF))
    return max(np.int32(largest).view(np.float32), _TINY)


@entry
def round_rows(counter: Numbers, x: Matrix, out: ByteRows) -> None:
    """Take blocks of rows from the queue until it is empty."""
    x, out = borrowed((x, out))
    rows, dim = len(out.scale), max(x.wide.shape[1], x.bits.shape[1])
    memory = aligned(_BLOCK * dim)
    scratch = borrowed(memory)
    while True:
        first = simd.take_number(counter.ctypes.data) * _BLOCK
        if first >= rows:
            hold(memory)
            return
        values = load(x, first, min(_BLOCK, rows - first), scratch)
        for i in range(values.shape[0]):
            largest = _largest(values[i])
            out.scale[first + i] = largest / _STEPS
            inverse = _STEPS / largest
            for d in range(dim):
                out.bytes[first + i, d] = np.uint8(np.int32(np.rint(values[i, d] * inverse)) + _OFFSET)
            out.bytes[first + i, dim:] = _OFFSET


@jit
def round_panel(values: Floats, out: BytePanel) -> None:
    """Round a panel (dim * PANEL,) of transposed rows."""
    dim, inverse = values.size // PANEL, out.inverse
    out.shift[:], inverse[:] = 0, _TINY
    for d in range(dim):
        for i in range(PANEL):
            inverse[i] = max(inverse[i], abs(values[d * PANEL + i]))
    for i in range(PANEL):
        out.scale[i], inverse[i] = inverse[i] / _STEPS, _STEPS / inverse[i]
    for word in range((dim - 1) // 4 + 1):
        for i in range(PANEL):
            out.words[word * PANEL + i] = 0
        for byte in range(min(4, dim - 4 * word)):
            for i in range(PANEL):
                value = np.int32(np.rint(values[(4 * word + byte) * PANEL + i] * inverse[i]))
                out.words[word * PANEL + i] |= (value & np.int32(255)) << np.int32(8 * byte)
                out.shift[i] += value * np.int32(_OFFSET)
