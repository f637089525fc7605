"""Tile maps and tensors as the shaders read them: 32-bit words, rows of whole vectors of four; and workgroups."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.vulkan.interface import Buffer, Provider
from aat_hf.vulkan.shapes import OTHER

VECTOR, WORD_BITS = 4, 32
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # KIND in the shaders
_INTEGER = {2: np.int16, 4: np.float32}

Integers = NDArray[np.int64]
Words = NDArray[np.uint32]
Number = TypeVar("Number", bound=np.generic)


class TileList(NamedTuple):
    """The exact tiles of a map and the mask inside the cut ones (`aat_hf.kernels.lowered_tiles.LoweredTiles`).

    Attributes:
        starts: (batch * heads * query_tiles + 1,) first tile of each row of the map.
        columns: (tiles,) key tile; cuts: (tiles,) place in `masks`, -1 where every pair is allowed.
        masks: (places, key_tile, at least query_tile) uint8.
    """

    starts: Tensor
    columns: Tensor
    cuts: Tensor
    masks: Tensor


class TileWords(NamedTuple):
    """The `tiles` buffer of a shader.

    Attributes:
        words: starts, columns (or rows of the map), cuts, entries (may be missing) and masks, one after the other.
        columns_at, cuts_at, entries_at, masks_at: where the parts begin; mask_words: words of a mask's row.
    """

    words: Words
    columns_at: int
    cuts_at: int
    entries_at: int
    masks_at: int
    mask_words: int


def joinable(key_tile: int) -> int:
    """How many neighbouring tiles of `key_tile` keys fit in one block of keys of the shaders."""
    return max(1, OTHER // key_tile)


def joined_numbers(rows: Integers, columns: Integers, count: int) -> Integers:
    """Which joined tile each tile of a map becomes a part of, counted from 0: (tiles,), in the order of `rows`.

    Columns [count * i, count * i + count) of a row are joined; `rows` and the `columns` of a row ascend.
    """
    begins = (np.diff(rows) != 0) | (np.diff(columns // count) != 0)
    return np.concatenate([[0], begins.cumsum()])[: len(columns)]


def join_tiles(tiles: TileList, key_tiles: int, count: int) -> TileList:
    """The same pairs in key tiles `count` times as long.

    A joined tile whose parts are all in the map and whole is whole; in others a mask hides the missing keys. Each
    distinct mask is stored once.

    Args:
        key_tiles: key tiles of the map before.
    """
    starts, columns, cuts, masks = (x.numpy() for x in tiles)
    number = joined_numbers(np.repeat(np.arange(len(starts) - 1), np.diff(starts)), columns, count)
    first = np.flatnonzero(np.diff(number, prepend=-1))
    joined = columns[first] // count
    missing, whole = len(masks), len(masks) + 1  # where such masks are put
    parts = np.full((count, len(first)), missing, np.int64)
    parts[columns % count, number] = np.where(cuts < 0, whole, cuts)
    parts[key_tiles % count :, joined == key_tiles // count] = whole  # past the last tile no keys are to be hidden
    cut = np.flatnonzero((parts != whole).any(0))
    kinds, places = _distinct_columns(parts[:, cut])
    joined_cuts = np.full_like(joined, -1)
    joined_cuts[cut] = places
    shape = masks.shape[1:]
    masks = np.concatenate([masks, np.zeros((1, *shape), np.uint8), np.ones((1, *shape), np.uint8)])
    masks = masks[kinds].reshape(len(kinds), count * shape[0], shape[1])
    return TileList(*map(torch.from_numpy, (first.searchsorted(starts), joined, joined_cuts, masks)))


def _distinct_columns(table: Integers) -> tuple[Integers, Integers]:
    """The distinct columns (kinds, rows) of two or more numbers >= 0, and which of them each column is.

    `np.unique(axis=1)` is slow.
    """
    base, code = int(table.max(initial=0)) + 1, table[0]
    for row in table[1:]:
        first, code = _distinct(code * base + row)
    return table[:, first].T, code


def _distinct(values: Integers) -> tuple[Integers, Integers]:
    """A place of each distinct value >= 0, in their order, and which of them each is: by a table, unless it is long."""
    size = int(values.max(initial=0)) + 1
    if size > 4 * len(values):
        _, first, index = np.unique(values, return_index=True, return_inverse=True)
        return first, index
    place = np.full(size, -1)
    place[values[::-1]] = np.arange(len(values))[::-1]  # the first of several
    there = place >= 0
    return place[there], (there.cumsum() - 1)[values]


def part_of(tiles: TileList, first: int, last: int) -> TileList:
    """The tiles of the rows [first, last) of the map."""
    begin, end = map(int, tiles.starts[[first, last]])
    starts = tiles.starts[first : last + 1] - begin
    return TileList(starts, tiles.columns[begin:end], tiles.cuts[begin:end], tiles.masks)


def by_rows(tiles: TileList, query_tile: int) -> TileWords:
    """The map for shaders whose workgroups own queries; a mask's row is one query against all keys of a tile."""
    masks = tiles.masks.numpy()[:, :, :query_tile].transpose(0, 2, 1)
    parts = [tiles.starts.numpy(), tiles.columns.numpy(), tiles.cuts.numpy(), np.empty(0, np.int64)]
    return _joined(parts, packed_bits(masks))


def by_columns(tiles: TileList, shape: tuple[int, int, int, int], kv_heads: int, query_tile: int) -> TileWords:
    """The map for shaders whose workgroups own keys: for every key tile of every head of k the rows that keep it.

    Args:
        shape: (batch, heads, query_tiles, key_tiles).
    """
    batch, heads, query_tiles, key_tiles = shape
    starts, columns = tiles.starts.numpy(), tiles.columns.numpy()
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    head = rows // query_tiles
    owner = (head // heads * kv_heads + head % heads // (heads // kv_heads)) * key_tiles + columns
    order = owner.argsort(kind="stable")
    counts = np.bincount(owner, minlength=batch * kv_heads * key_tiles)
    own_starts = np.concatenate([[0], counts.cumsum()])
    parts = [own_starts, rows[order], tiles.cuts.numpy()[order], order]
    return _joined(parts, packed_bits(tiles.masks.numpy()[:, :, :query_tile]))


def packed_bits(mask: NDArray[np.generic]) -> Words:
    """Truth values (..., n) as bits of ceil(n / 32) words, the first in the lowest bit."""
    padding = -mask.shape[-1] % WORD_BITS
    if padding:
        mask = np.concatenate([mask, np.zeros((*mask.shape[:-1], padding), mask.dtype)], -1)
    return np.packbits(np.ascontiguousarray(mask).astype(bool, copy=False), axis=-1, bitorder="little").view(np.uint32)


def _joined(parts: list[Integers], masks: Words) -> TileWords:
    edges = np.cumsum([len(part) for part in parts])
    words = np.concatenate([*(part.astype(np.uint32) for part in parts), masks.ravel()])  # a cut of -1: all bits set
    columns_at, cuts_at, entries_at, masks_at = map(int, edges)
    return TileWords(words, columns_at, cuts_at, entries_at, masks_at, masks.shape[-1])


def vectors(dim: int) -> int:
    """Vectors of four in a row of `dim` elements."""
    return -(-dim // VECTOR)


def row_bytes(x: Tensor) -> int:
    """Bytes of `x` (..., dim) in a buffer."""
    return max(4, x.shape[:-1].numel() * vectors(x.shape[-1]) * VECTOR * x.element_size())


def room(shape: torch.Size | tuple[int, ...]) -> int:
    """Bytes of float32 rows of `shape` (..., dim)."""
    return row_bytes(torch.empty(shape, dtype=torch.float32, device="meta"))


def fresh(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor with undefined contents, in memory for which numpy asks huge pages: touching small ones takes long."""
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def write_rows(buffer: Buffer, x: Tensor) -> None:
    """Copy `x` (..., dim) into the buffer's host memory, rows padded with zeros to whole vectors."""
    target = _rows(buffer, x.shape, x.dtype)
    target[..., : x.shape[-1]].copy_(x.detach())
    if target.shape[-1] > x.shape[-1]:
        target[..., x.shape[-1] :].zero_()


def read_rows(buffer: Buffer, target: Tensor) -> Tensor:
    """`target` (..., dim), filled from a buffer of float32 rows."""
    return target.copy_(_rows(buffer, target.shape, torch.float32)[..., : target.shape[-1]])


def write_words(buffer: Buffer, words: NDArray[np.generic]) -> None:
    """Copy 32-bit words into the buffer's host memory."""
    _words(buffer, words.size).copy_(torch.from_numpy(np.ascontiguousarray(words).reshape(-1).view(np.int32)))


def read_words(buffer: Buffer, shape: tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """A copy of 32-bit words of `dtype`."""
    return _words(buffer, math.prod(shape)).clone().numpy().view(dtype).reshape(shape)


def threads(provider: Provider) -> int:
    """Invocations of a workgroup whose invocations do not work together."""
    return 64 if provider.device.kind == "cpu" else 256


def spread(provider: Provider, groups: int) -> tuple[int, int, int]:
    """So many workgroups, or a few more, along x and then y."""
    most = provider.device.max_groups[0]
    return min(groups, most), -(-groups // most), 1


def _words(buffer: Buffer, count: int) -> Tensor:
    """The first words of the buffer's host memory (count,): a tensor, for torch copies with all of its threads."""
    return torch.from_numpy(buffer.view()[: 4 * count].view(np.int32))


def _rows(buffer: Buffer, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The buffer's host memory as rows (..., whole vectors)."""
    width = vectors(shape[-1]) * VECTOR
    size = shape[:-1].numel() * width * dtype.itemsize
    numbers = torch.from_numpy(buffer.view()[:size].view(_INTEGER[dtype.itemsize]))
    return numbers.view(dtype).view(*shape[:-1], width)
