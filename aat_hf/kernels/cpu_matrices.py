"""What the compiled loops of the CPU kernels share: types, matrices of any input dtype, panels.

Queries sit in vector lanes, `PANEL` at a time, so everything about a panel is kept transposed: Q^T, O^T and the
scores (keys, PANEL). Rows of K and V are then read where they lie, a scalar at a time, and the softmax needs no sums
across lanes. Scores are in base 2: log2(e) is part of the factor of q. Matrices go to the micro-kernels by address.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

from aat_hf.kernels.cpu_team import call_by_team
from aat_hf.kernels.simd_emit import LANES, PANEL
from aat_hf.kernels.simd_transpose import transpose, transpose_each

KEYS = 64  # keys whose scores are held at once
Floats: TypeAlias = NDArray[np.float32]
Numbers: TypeAlias = NDArray[np.int64]
Bytes: TypeAlias = NDArray[np.uint8]
_OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
jit = njit(**_OPTIONS)
inlined = njit(inline="always", **_OPTIONS)
# numba's cache looks at a loop's own file only
_SHARED = sorted(path.name for pattern in ("simd*.py", "cpu_*.py") for path in Path(__file__).parent.glob(pattern))
_CODE = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in _SHARED)).hexdigest()


def entry(function: Any) -> Any:
    """Compile a loop that `cpu_threads.run` calls, and cache the result on disk where numba finds a place.

    The result takes `Team.enter`, a number of threads, and what the loop takes.
    """
    scope = {"__name__": function.__module__, "call_by_team": call_by_team, "_loop": jit(function)}
    call = FunctionType(_call_loop.__code__, scope, function.__name__)
    # The cache's file is named after this, so that a change of the loop or of what all loops share counts.
    own = function.__code__
    code = hashlib.sha256(f"{_CODE} {own.co_code.hex()} {own.co_names} {own.co_consts}".encode()).hexdigest()
    call.__qualname__ = f"{function.__name__}_{LANES}_{code[:16]}"
    try:
        return njit(cache=True, **_OPTIONS)(call)
    except RuntimeError as error:
        text = "every process will compile the CPU kernels anew, set NUMBA_CACHE_DIR to a writable directory: %s"
        logging.getLogger("aat_hf").warning(text, error)
        return njit(**_OPTIONS)(call)


def _loop(*arguments: Any) -> None:
    """In each `entry`, its own loop."""


def _call_loop(enter: int, threads: int, *arguments: Any) -> None:
    """Have `_loop` called by so many threads."""
    if threads == 1:
        _loop(*arguments)
    elif call_by_team(enter, threads, _loop, arguments):
        raise MemoryError("a thread of the CPU kernels found no memory")


class Matrix(NamedTuple):
    """(rows, dim) float32 in `wide`, or the bits of bfloat16 (kind 1) or float16 (kind 2) in `bits`."""

    wide: Floats
    bits: NDArray[np.uint16]
    kind: int


class Grid(NamedTuple):
    """Which tiles are computed.

    Attributes:
        starts: (batch * heads * query_tiles + 1,) int64; row r has the tiles starts[r] <= t < starts[r + 1].
        columns: (tiles,) int64, key tile.
        cuts: (tiles,) int64, index into `masks`; -1 when the mask does not cut the tile.
        masks: (cut tiles, key_tile, padded query_tile) uint8, 1 where the query may see the key.
    """

    starts: Numbers
    columns: Numbers
    cuts: Numbers
    masks: Bytes
    heads: int
    kv_heads: int
    queries: int
    keys: int
    query_tile: int
    key_tile: int


class Centroids(NamedTuple):
    """Key tiles that stand as one key each, their mean, with the weight of all their keys.

    Attributes:
        starts: (rows of the grid + 1,) int64; row r has the tiles starts[r] <= t < starts[r + 1]. Empty: no such level.
        columns: (coarse tiles,) int64, key tile, ascending in a row.
        k: (batch * kv_heads * key_tiles, head_dim) float32, mean keys.
        v: (batch * kv_heads * key_tiles, value_dim) float32, mean values.
    """

    starts: Numbers
    columns: Numbers
    k: Floats
    v: Floats


class Rule(NamedTuple):
    """How a base-2 score is made: outer * tanh(inner * q k) if capped, else q k with `factor` in q.

    Attributes:
        factor: what q is multiplied with (1 if capped).
        scale: derivative of a natural score by q k, without tanh's own.
        skip: base-2 threshold of the skip rule; -inf: off.
    """

    factor: np.float32
    inner: np.float32
    outer: np.float32
    capped: bool
    scale: np.float32
    skip: np.float32


@jit
def aligned(size: int) -> Any:
    """Uninitialised float32 (size,) at a multiple of 64 bytes."""
    buffer = np.empty(size + 16, np.float32)
    first = (-(buffer.ctypes.data // 4)) % 16
    return buffer[first : first + size]


def whole_panels(size: int) -> int:
    """`size` rounded up."""
    return (size + PANEL - 1) // PANEL * PANEL


padded = jit(whole_panels)  # for compiled code


@jit
def load(x: Matrix, first: int, count: int, scratch: Floats) -> Any:
    """Rows first .. first + count as float32 (count, dim): in place, or converted into `scratch`."""
    if x.kind == 0:
        return x.wide[first : first + count]
    words = scratch.view(np.uint32)
    dim = x.bits.shape[1]
    bits = x.bits[first : first + count].reshape(-1)
    if x.kind == 1:
        for i in range(bits.size):
            words[i] = np.uint32(bits[i]) << np.uint32(16)
    else:
        for i in range(bits.size):
            words[i] = np.uint32(bits[i] & np.uint16(0x7FFF)) << np.uint32(13)
        for i in range(bits.size):
            scratch[i] *= np.float32(2.0**112)  # the exponents' biases; right for denormals too
        for i in range(bits.size):
            sign = np.uint32(bits[i] & np.uint16(0x8000)) << np.uint32(16)
            special = np.uint32(0x7F800000) if (bits[i] & np.uint16(0x7C00)) == 0x7C00 else np.uint32(0)
            words[i] |= sign | special
    return scratch[: count * dim].reshape(count, dim)


@jit
def store(x: Matrix, row: int, scratch: Floats) -> None:
    """Write `scratch` (dim,) as one row, rounded to nearest even."""
    if x.kind == 0:
        for i in range(x.wide.shape[1]):
            x.wide[row, i] = scratch[i]
        return
    words = scratch.view(np.uint32)
    for i in range(x.bits.shape[1]):
        w = words[i]
        sign, size = (w >> np.uint32(16)) & np.uint32(0x8000), w & np.uint32(0x7FFFFFFF)
        if size > np.uint32(0x7F800000):
            half = np.uint32(0x7FFF)
        elif x.kind == 1:
            half = (size + np.uint32(0x7FFF) + ((size >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        elif size >= np.uint32(0x47800000):
            half = np.uint32(0x7C00)
        elif size < np.uint32(0x38800000):  # a denormal float16, a multiple of 2^-24: adding 1/2 rounds to these
            scratch[i] = abs(scratch[i]) + np.float32(0.5)
            half = words[i] - np.uint32(0x3F000000)
        else:
            odd = (size >> np.uint32(13)) & np.uint32(1)
            half = (size - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
        x.bits[row, i] = np.uint16(sign | half)


@jit
def pack(rows: Floats, lane: int, factor: np.float32, panel: Floats) -> None:
    """panel (dim, PANEL) = factor * rows[lane : lane + PANEL]^T; the last row fills the lanes past the end."""
    dim, last = rows.shape[1], rows.shape[0] - 1
    whole = dim // LANES * LANES if lane + PANEL <= rows.shape[0] else 0
    for d in range(0, whole, LANES):
        for i in range(0, PANEL, LANES):
            at, to = rows[lane + i].ctypes.data + 4 * d, panel[d * PANEL + i :].ctypes.data
            transpose(at, dim, to, PANEL, factor)
    for d in range(whole, dim):
        for i in range(PANEL):
            panel[d * PANEL + i] = rows[min(lane + i, last), d] * factor


@jit
def unpack(panel: Floats, dim: int, factors: Floats, rows: Floats) -> None:
    """rows (PANEL, dim) = panel (dim, PANEL)^T, each times its lane's factor."""
    whole = dim // LANES * LANES
    for d in range(0, whole, LANES):
        for i in range(0, PANEL, LANES):
            at, to = panel[d * PANEL + i :].ctypes.data, rows[i * dim + d :].ctypes.data
            transpose_each(at, PANEL, to, dim, factors[i:].ctypes.data)
    for i in range(PANEL):
        for d in range(whole, dim):
            rows[i * dim + d] = panel[d * PANEL + i] * factors[i]


@jit
def widen(rows: Floats, width: int, out: Floats) -> None:
    """Copy (n, dim) into rows of `width` floats, the rest 0."""
    dim = rows.shape[1]
    for i in range(rows.shape[0]):
        out[i * width : i * width + dim] = rows[i]
        out[i * width + dim : (i + 1) * width] = 0


@jit
def seen_keys(masks: Bytes, cut: int, first: int, count: int, lane: int) -> tuple[int, int]:
    """Range of the keys first .. first + count that a query of the panel at `lane` may see, relative to `first`."""
    low, high = count, 0
    for j in range(count):
        seen = np.uint8(0)
        for i in range(PANEL):
            seen |= masks[cut, first + j, lane + i]
        if seen:
            low = min(low, j)
            high = j + 1
    return low, high


@jit
def place(row: int, grid: Grid) -> tuple[int, int, int, int]:
    """Head, head of k and v, first query and one past the last of a query tile; heads counted through the batch."""
    tiles = (grid.queries - 1) // grid.query_tile + 1
    head = row // tiles
    kv_head = head // grid.heads * grid.kv_heads + head % grid.heads // (grid.heads // grid.kv_heads)
    first = row % tiles * grid.query_tile
    return head, kv_head, first, min(first + grid.query_tile, grid.queries)


@jit
def adjoining(tile: int, step: int, end: int, grid: Grid, rule: Rule) -> int:
    """How many tiles from `tile` on, in steps of 1 or -1 and before `end`, make one run of `KEYS` uncut keys at most.

    1 under the skip rule, which keeps account of single tiles.
    """
    count = 1
    if rule.skip > -np.inf or grid.cuts[tile] >= 0:
        return count
    while (count + 1) * grid.key_tile <= KEYS and tile + count * step != end:
        following = tile + count * step
        if grid.cuts[following] >= 0 or grid.columns[following] != grid.columns[tile] + count * step:
            return count
        count += 1
    return count


@jit
def gather(centroids: Centroids, first: int, end: int, kv_head: int, grid: Grid, k: Floats, v: Floats) -> Any:
    """Copy centroids first .. end, `KEYS` at most and of tiles of one size, to rows of `k` and `v`.

    Returns:
        How many, and log2 of the size: scores against a running maximum or log-sum-exp lowered by it need no bias.
    """
    dim, value_dim = centroids.k.shape[1], centroids.v.shape[1]
    first_row, whole_tiles = kv_head * ((grid.keys - 1) // grid.key_tile + 1), grid.keys // grid.key_tile
    count = 0
    for tile in range(first, min(end, first + KEYS)):
        column = centroids.columns[tile]
        if column == whole_tiles and count:  # a shorter last tile comes alone
            break
        for d in range(dim):
            k[count * dim + d] = centroids.k[first_row + column, d]
        for d in range(value_dim):
            v[count * value_dim + d] = centroids.v[first_row + column, d]
        count += 1
    size = min(grid.key_tile, grid.keys - centroids.columns[first] * grid.key_tile)
    return count, np.float32(np.log2(size))


@jit
def piece(lane: int, key: int, grid: Grid) -> int:
    """Number of a piece (panel of queries, block of keys) of a tile; `lane` and `key` count from its start."""
    return lane // PANEL * ((grid.key_tile - 1) // KEYS + 1) + key // KEYS
