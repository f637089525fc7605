"""Mean and variance of groups of keys on the CPU, compiled by numba: `aat_hf.tiling.moments.summarise` in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.kernels import simd
from aat_hf.kernels.cpu import as_matrix
from aat_hf.kernels.cpu_matrices import Floats, Matrix, Numbers, aligned, entry, load, widen
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.simd_borrow import borrowed, hold
from aat_hf.kernels.simd_emit import LANES
from aat_hf.kernels.simd_moments import row_moments

_BLOCK = 64  # groups of a work item


def moments_of_groups(k: Tensor, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance of each coordinate of `groups` runs of `size` keys, the last ones shorter or empty.

    Args:
        k: (batch, kv_heads, keys, head_dim), float32, bfloat16 or float16.

    Returns:
        both (batch, kv_heads, groups, head_dim) float32; 0 for groups without keys.
    """
    batch, heads, keys, dim = k.shape
    mean, variance = torch.empty(2, batch, heads, groups, dim)
    flat = (x.view(batch * heads, groups, dim).numpy() for x in (mean, variance))
    run(summarise, 4 * k.numel(), as_matrix(k), keys, size, *flat)
    return mean, variance


@entry
def summarise(counter: Numbers, k: Matrix, keys: int, size: int, mean: Floats, variance: Floats) -> None:
    """Take blocks of groups from the queue until it is empty; mean, variance: (batch * kv_heads, groups, head_dim)."""
    k, mean, variance = borrowed((k, mean, variance))
    heads, groups, dim = mean.shape
    blocks, width = (groups - 1) // _BLOCK + 1, ((dim - 1) // LANES + 1) * LANES
    memory = aligned(size * dim), aligned(size * width), aligned(2 * width)
    scratch, wide, found = borrowed(memory)
    while True:
        taken = simd.take_number(counter.ctypes.data)
        if taken >= heads * blocks:
            hold(memory)
            return
        head, start = taken // blocks, taken % blocks * _BLOCK
        for group in range(start, min(start + _BLOCK, groups)):
            count = min(size, keys - group * size)
            if count <= 0:
                mean[head, group] = 0
                variance[head, group] = 0
                continue
            rows = load(k, head * keys + group * size, count, scratch)
            if width == dim:
                out = mean[head, group].ctypes.data, variance[head, group].ctypes.data
                row_moments(rows.ctypes.data, dim // LANES, count, out[0], out[1])
                continue
            widen(rows, width, wide)
            row_moments(wide.ctypes.data, width // LANES, count, found.ctypes.data, found[width:].ctypes.data)
            for d in range(dim):
                mean[head, group, d], variance[head, group, d] = found[d], found[width + d]
