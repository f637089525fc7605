"""The steps of tile selection on a Vulkan device, from tensors on the CPU.

Every function takes the provider first; all compute in float32 and give the same bits every time. Errors are those of
`Provider.buffer` and `Provider.submit`. Attention itself is in `attention`, plain operations are in `plain`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from aat_hf.tiling.layout import tiles
from aat_hf.tiling.masks import NONE, AttentionMask
from aat_hf.tiling.measure import RowMasses, normalised
from aat_hf.tiling.moments import Moments
from aat_hf.vulkan import lowering, profile
from aat_hf.vulkan.interface import Dispatch, Provider, float_bits
from aat_hf.vulkan.lowering import KINDS, vectors
from aat_hf.vulkan.shapes import variant
from aat_hf.vulkan.workspace import Workspace

_LOG2E = 1 / math.log(2)


def tile_moments(provider: Provider, k: Tensor, key_tile: int, groups: int) -> Moments:
    """`aat_hf.tiling.moments.summarise` on the device; k (batch, kv_heads, keys, head_dim)."""
    batch, heads, keys, dim = k.shape
    size, shape = key_tile // groups, (batch, heads, tiles(keys, key_tile), groups, dim)
    runs = shape[2] * groups
    with Workspace(provider) as work:
        source, mean, variance = work.buffers(k, lowering.room(shape), lowering.room(shape))
        threads = lowering.threads(provider)
        invocations = batch * heads * runs * vectors(dim)
        push = runs, size, keys, vectors(dim), batch * heads
        spec = threads, KINDS[k.dtype]
        groups_xyz = lowering.spread(provider, -(-invocations // threads))
        work.run(Dispatch("tile_moments", (source, mean, variance), groups_xyz, spec, push), fetch=(mean, variance))
        found = [lowering.read_rows(buffer, torch.empty(shape)) for buffer in (mean, variance)]
    first = torch.arange(runs) * size
    count = ((first + size).clamp(max=keys) - first).clamp(min=0).view(-1, groups)
    return Moments(count, *found)


def measure_rows(
    provider: Provider,
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None = None,
) -> RowMasses:
    """`aat_hf.tiling.measure.measure_rows` on the device: Born probabilities of the key tiles for `rows` (R,)."""
    chosen, keys = q[:, :, rows], k.shape[2]
    key_tiles = tiles(keys, key_tile)
    bits = _row_bits(mask.rows(rows), key_tile)
    own_batch, own_heads = (size > 1 for size in bits.shape[:2])
    shape = profile.shape(provider.device, "forward", vectors(q.shape[3]), vectors(q.shape[3]), len(rows))
    cap = softcap or 1.0
    numbers = scale * _LOG2E, scale / cap, cap * _LOG2E, 0.0
    strides = int(own_batch) * bits.shape[1], int(own_heads)
    with Workspace(provider) as work:
        *inputs, result = work.buffers(chosen, k, bits, 4 * chosen.shape[:3].numel() * key_tiles)
        sizes = q.shape[1], k.shape[1], len(rows), keys, len(rows), key_tile, 1, key_tiles
        push = (*sizes, 0, *strides, 0, bits.shape[-1], 1, 1, *map(float_bits, numbers))
        width = vectors(q.shape[3])
        spec = shape.threads, shape.rows, shape.chunk, width, width, KINDS[q.dtype], int(softcap is not None), 0
        groups = key_tiles * -(-len(rows) // shape.own), q.shape[1], q.shape[0]
        dispatch = Dispatch(variant("row_masses", provider.device), (*inputs, result), groups, spec, push)
        work.run(dispatch, fetch=(result,))
        log_mass = lowering.read_words(result, (*chosen.shape[:3], key_tiles), np.float32)
    return normalised(torch.from_numpy(log_mass), None)


def select_tiles(
    provider: Provider,
    mass: Tensor,
    forced: Tensor,
    states: Tensor,
    tolerance: Tensor,
    max_kept: float,
    free_mass: Tensor | None = None,
) -> Tensor:
    """`aat_hf.tiling.select.select_tiles` on the device, in float32: bool (batch, heads, query_tiles, key_tiles)."""
    visible = (states != NONE).expand(mass.shape)
    mass = mass.float().nan_to_num(nan=1.0).clamp(min=0).masked_fill(~visible, 0.0)
    whole = mass.sum(-1, dtype=torch.float64) + (0 if free_mass is None else free_mass)
    budget = tolerance[..., None] * whole
    budgets = torch.stack([budget.float(), (budget - budget.float()).float()], -1)
    rows, count = mass.shape[:-1].numel(), mass.shape[-1]
    arrays = mass.masked_fill(~visible, -1.0), forced.expand(mass.shape).to(torch.int32), budgets
    with Workspace(provider) as work:
        *inputs, kept = work.buffers(*(x.contiguous().numpy() for x in arrays), 4 * mass.numel())
        threads = 8 if provider.device.kind == "cpu" else 64
        push = rows, count, float_bits(max_kept)
        work.run(
            Dispatch("select_tiles", (*inputs, kept), lowering.spread(provider, rows), (threads,), push), fetch=(kept,)
        )
        return torch.from_numpy(lowering.read_words(kept, tuple(mass.shape), np.int32) != 0)


def _row_bits(allowed: Tensor, key_tile: int) -> lowering.Words:
    """A mask (..., rows, keys) as bits, every tile in whole words: (..., rows, key_tiles, words)."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % key_tile))
    return lowering.packed_bits(padded.unflatten(-1, (-1, key_tile)).numpy())
