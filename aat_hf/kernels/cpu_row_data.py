"""What the row measurement's compiled loops work on; they are in `cpu_row_loops` and `cpu_row_tiles`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aat_hf.kernels.cpu_bytes import BytePanel, ByteRows
from aat_hf.kernels.cpu_matrices import Floats, Matrix, jit
from aat_hf.kernels.simd_emit import PANEL

KEYS = 256  # keys, or groups of keys, whose scores are held at once
TOTAL, LARGEST, BLOCK, UNREAD = range(4)  # rows of `Slots.state`


class Rows(NamedTuple):
    """Which rows see which keys.

    Attributes:
        rows: (R,) int64, query rows, ascending.
        together: so many of them share a row of the result, their mean; divides `PANEL` or is a multiple of it.
        sinks: (heads,) float32, base-2 logit of one more key of each row that no tile holds; (0,) for none.
        first, last: (batch or 1, queries) int64, row i sees first[i] <= j < last[i].
        valid: (batch or 1, keys + 1) int64, number of valid keys before each; (0, 0) when all are.
        heads, kv_heads: of q and k.
        queries, keys, key_tile: lengths.
        rough: exponentials may be 4 % off.
    """

    rows: NDArray[np.int64]
    together: int
    sinks: NDArray[np.float32]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    valid: NDArray[np.int64]
    heads: int
    kv_heads: int
    queries: int
    keys: int
    key_tile: int
    rough: bool


class Keys(NamedTuple):
    """The rows of all keys: `wide` as they are, or in their place `small`, rounded."""

    wide: Matrix
    small: ByteRows


class Summary(NamedTuple):
    """Moments of groups of keys, for prediction.

    Attributes:
        mean, variance: (batch * kv_heads * key_tiles * groups, head_dim) float32; small_mean, small_variance: in their
            place the same, rounded.
        critical, log_size: (key_tiles * groups,) float32: sqrt(2 ln n) and log2 n of each group.
        groups: of a tile; 0: nothing is predicted, every tile is exact.
        near: (batch or 1, queries) int64, first tile of each row's local band; `width` tiles are exact from there.
        sink: so many first tiles are exact.
    """

    mean: Floats
    variance: Floats
    small_mean: ByteRows
    small_variance: ByteRows
    critical: NDArray[np.float32]
    log_size: NDArray[np.float32]
    groups: int
    near: NDArray[np.int64]
    width: int
    sink: int
    softcap: np.float32


class Slots(NamedTuple):
    """What one thread knows of its panel's tiles.

    Attributes:
        queries, squares: (dim * PANEL,) the rows times the factor and their squares, transposed; dim rounded up to a
            multiple of LANES with zeros.
        small_queries, small_squares: the same, rounded, where they are in use.
        mass: (tiles * groups * PANEL,), and room for LANES tiles more, base-2 log masses, later masses relative to the
            row's largest.
        weight: (tiles * PANEL,) factor of a tile's mass, where `weighted`.
        weighted: (tiles,) uint8.
        scores, spreads, scratch: of `KEYS` keys or groups.
        state: (4, PANEL), a number for each row: `TOTAL` of its masses, its `LARGEST` log mass, its largest score in
            the `BLOCK` of keys at hand; `UNREAD` takes what micro-kernels write and nobody reads.
        share: (PANEL,) what each lane's masses are multiplied by.
        block: (LANES * LANES,) masses of some lanes and tiles, a lane in a row.
        allowed: (KEYS * PANEL,) uint8, the mask of a block of keys.
        first, last: (PANEL,) int64, each row sees the keys first <= j < last.
    """

    queries: Floats
    squares: Floats
    small_queries: BytePanel
    small_squares: BytePanel
    mass: NDArray[np.float32]
    weight: NDArray[np.float32]
    weighted: NDArray[np.uint8]
    scores: NDArray[np.float32]
    spreads: NDArray[np.float32]
    scratch: NDArray[np.float32]
    state: NDArray[np.float32]
    share: NDArray[np.float32]
    block: NDArray[np.float32]
    allowed: NDArray[np.uint8]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


@jit
def address(x: NDArray[np.float32], row: int) -> int:
    """Address of panel number `row`."""
    return x.ctypes.data + row * PANEL * 4
