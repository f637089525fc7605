"""Rows rounded to 8 bits, for estimates: of keys and of their moments as a whole, of queries a panel at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Floats, Matrix, Numbers, aligned, entry, jit, load, widen
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_bytes import round_panel, round_rows
from aat_hf.kernels.simd_emit import LANES, PANEL

_BLOCK = 256  # rows of a work item
_SAMPLE = 64  # rows of a head whose sizes say how large rounding errors are


class ByteRows(NamedTuple):
    """Rows of `bytes` / 4 words: scale[i] * (bytes[i] - 128) is row i, rounded. Without elements: not in use.

    Attributes:
        bytes: (rows, dim rounded up to a multiple of LANES) uint8.
        scale: (rows,) float32.
    """

    bytes: NDArray[np.uint8]
    scale: Floats


class BytePanel(NamedTuple):
    """A panel of rows: scale[i] * its bytes is row i, rounded.

    Attributes:
        words: (words * PANEL,) int32, four signed bytes of a row each.
        scale: (PANEL,) float32; shift: (PANEL,) int32, 128 times the sum of the row's bytes.
    """

    words: NDArray[np.int32]
    scale: Floats
    shift: NDArray[np.int32]


NO_BYTES = ByteRows(np.empty((0, 0), np.uint8), np.empty(0, np.float32))


def byte_rows(x: Matrix) -> ByteRows:
    """Round every row."""
    rows, dim = (x.bits if x.kind else x.wide).shape
    found = ByteRows(np.empty((rows, -(-dim // LANES) * LANES), np.uint8), np.empty(rows, np.float32))
    run(round_all, 8 * rows * dim, x, found)
    return found


def score_error(q: Tensor, k: Tensor, rounded: ByteRows, scale: float) -> float:
    """Standard deviation of the error that rounding q and k makes in a score, in nats: that of the worst head.

    A row x has the step s = max |x| / 127, and errors that are taken as independent and uniform in one: the variance of
    scale * q k is scale^2 (|q|^2 s_k^2 + |k|^2 s_q^2) / 12, by means over some rows.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim); rounded: its rows.
    """
    some_q, some_k = (x.detach()[:, :, :: max(1, x.shape[2] // _SAMPLE)].float() for x in (q, k))
    step_q = some_q.abs().amax(-1).div(127).square().mean(-1).unflatten(1, (k.shape[1], -1))  # [B, G, heads of each]
    step_k = torch.from_numpy(rounded.scale).view(k.shape[:3]).square().mean(-1)  # [B, G]
    length_q = some_q.square().sum(-1).mean(-1).unflatten(1, (k.shape[1], -1))
    length_k = some_k.square().sum(-1).mean(-1)
    variance = (length_q * step_k[..., None] + length_k[..., None] * step_q) / 12
    return scale * math.sqrt(float(variance.max()))


@entry
def round_all(counter: Numbers, x: Matrix, out: ByteRows) -> None:
    """Take blocks of rows from the queue until it is empty."""
    x, out = borrowed((x, out))
    rows, width, dim = len(out.scale), out.bytes.shape[1], max(x.wide.shape[1], x.bits.shape[1])
    memory = aligned(_BLOCK * dim), aligned(_BLOCK * width)
    scratch, wide = borrowed(memory)
    while True:
        first = simd.take_number(counter.ctypes.data) * _BLOCK
        if first >= rows:
            hold(memory)
            return
        count = min(_BLOCK, rows - first)
        values = load(x, first, count, scratch)
        at = values.ctypes.data
        if width > dim:
            widen(values, width, wide)
            at = wide.ctypes.data
        round_rows(at, width // LANES, count, out.bytes.ctypes.data + first * width, out.scale[first:].ctypes.data)


@jit
def empty_panel(dim: int) -> BytePanel:
    """Room for a rounded panel; `dim` a multiple of 4."""
    return BytePanel(np.empty(dim // 4 * PANEL, np.int32), aligned(PANEL), np.empty(PANEL, np.int32))


@jit
def fill_panel(values: Floats, out: BytePanel) -> None:
    """Round a panel (dim * PANEL,) of transposed rows."""
    words = out.words.size // PANEL
    round_panel(values.ctypes.data, words, out.words.ctypes.data, out.scale.ctypes.data, out.shift.ctypes.data)
