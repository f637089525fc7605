"""Sums of dK and dV in float32, one for each chunk of a backward pass, and their total, compiled by numba."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu_matrices import Bytes, Floats, Matrix, Numbers, aligned, entry, jit, store, whole_panels
from aat_hf.kernels.simd_borrow import borrowed, hold


class Sums(NamedTuple):
    """Sums of the chunks of all heads of k and v, not initialised.

    Attributes:
        first: (heads, keys, padded dim) of each head's first chunk; the memory of the gradient itself if it has
            this form.
        others: (heads * other chunks, keys, padded dim).
    """

    first: Floats
    others: Floats


def sums_for(gradient: Tensor, chunks: int, in_place: bool) -> Sums:
    """Sums of `chunks` for each head of a contiguous gradient (batch, kv_heads, keys, dim)."""
    heads, shape = gradient.shape[0] * gradient.shape[1], (gradient.shape[2], whole_panels(gradient.shape[3]))
    # elsewhere numpy's own memory: unlike torch it asks for huge pages, and first touches are what these cost
    first = gradient.view(heads, *shape).numpy() if in_place else np.empty((heads, *shape), np.float32)
    return Sums(first, np.empty((heads * (chunks - 1), *shape), np.float32))


@jit
def of_chunk(sums: Sums, chunk: int) -> Floats:
    """The sums (keys, padded dim) of one chunk; a head's chunks follow one another."""
    others = sums.others.shape[0] // sums.first.shape[0]
    head, number = chunk // (others + 1), chunk % (others + 1)
    return sums.first[head] if number == 0 else sums.others[head * others + number - 1]


@entry
def reduce(counter: Numbers, sums: Sums, touched: Bytes, keys: int, key_tile: int, in_place: bool, out: Matrix) -> None:
    """Take key tiles of heads of k and v from the queue until it is empty; write the totals of their chunks to `out`.

    Args:
        touched: (chunks, key_tiles) uint8, 0 where a chunk's sums hold nothing.
        in_place: the sums of the first chunks are the memory of `out`.
    """
    sums, touched, out = borrowed((sums, touched, out))
    heads, tiles = sums.first.shape[0], (keys - 1) // key_tile + 1
    dim, chunks = max(out.wide.shape[1], out.bits.shape[1]), touched.shape[0] // heads
    memory = aligned(dim)
    total = borrowed(memory)
    while True:
        item = simd.take_number(counter.ctypes.data)
        if item >= heads * tiles:
            hold(memory)
            return
        head, column = item // tiles, item % tiles
        begin = head * chunks
        if in_place and touched[begin, column] and not touched[begin + 1 : begin + chunks, column].any():
            continue
        for key in range(column * key_tile, min(column * key_tile + key_tile, keys)):
            total[:] = 0
            for chunk in range(begin, begin + chunks):
                if touched[chunk, column]:
                    own = of_chunk(sums, chunk)
                    for d in range(dim):
                        total[d] += own[key, d]
            store(out, head * keys + key, total)
