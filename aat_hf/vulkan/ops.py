"""Operations on a Vulkan device from tensors on the CPU: the steps of tile selection, and the plain ones to compare.

Every function takes the provider first; all compute in float32 and give the same bits every time. Errors are those of
`Provider.buffer` and `Provider.submit`. Attention itself is in `attention`.
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
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider, float_bits
from aat_hf.vulkan.lowering import KINDS, VECTOR, vectors
from aat_hf.vulkan.shapes import variant
from aat_hf.vulkan.workspace import Workspace

_LOG2E = 1 / math.log(2)
_MATMUL_LANES = 16  # LANES in matmul.comp
ELEMENTWISE = {"add": 0, "mul": 1, "relu": 2}  # OPERATION in elementwise.comp


def elementwise(provider: Provider, operation: str, a: Tensor, b: Tensor | None = None) -> Tensor:
    """a + b ("add"), a * b ("mul") or max(a, 0) ("relu") of float32 tensors of one shape."""
    with Workspace(provider) as work:
        first = work.rows(a.reshape(-1))
        second = first if b is None else work.rows(b.reshape(-1))
        result = work.result((a.numel(),))
        work.run(elementwise_dispatch(provider, operation, first, second, result, a.numel()), fetch=(result,))
        return lowering.read_rows(result, torch.Size((a.numel(),)), torch.float32).view(a.shape)


def matmul(provider: Provider, a: Tensor, b: Tensor) -> Tensor:
    """(batch, rows, columns) from a (batch, rows, depth) and b (batch, depth, columns), float32."""
    padding = -a.shape[2] % VECTOR  # rows of b that meet the padding of a
    b = torch.nn.functional.pad(b, (0, 0, 0, padding)) if padding else b
    with Workspace(provider) as work:
        inputs, result = (work.rows(a), work.rows(b)), work.result((*a.shape[:2], b.shape[2]))
        work.run(matmul_dispatch(provider, *inputs, result, (*a.shape[:2], b.shape[1], b.shape[2])), fetch=(result,))
        return lowering.read_rows(result, torch.Size((*a.shape[:2], b.shape[2])), torch.float32)


def softmax(provider: Provider, a: Tensor) -> Tensor:
    """Softmax over the last dimension, float32; scores below -1e30 count as -1e30."""
    rows, columns = a.shape[:-1].numel(), a.shape[-1]
    with Workspace(provider) as work:
        source, result = work.words(a.detach().contiguous().numpy()), work.empty(4 * a.numel())
        threads = 8 if provider.device.kind == "cpu" else 128
        groups = _spread(provider, rows)
        work.run(Dispatch("row_softmax", (source, result), groups, (threads,), (rows, columns)), fetch=(result,))
        return torch.from_numpy(lowering.read_words(result, tuple(a.shape), np.float32))


def tile_moments(provider: Provider, k: Tensor, key_tile: int, groups: int) -> Moments:
    """`aat_hf.tiling.moments.summarise` on the device; k (batch, kv_heads, keys, head_dim)."""
    batch, heads, keys, dim = k.shape
    size, shape = key_tile // groups, (batch, heads, tiles(keys, key_tile), groups, dim)
    runs = shape[2] * groups
    with Workspace(provider) as work:
        source, mean, variance = work.rows(k), work.result(shape), work.result(shape)
        threads = _threads(provider)
        invocations = batch * heads * runs * vectors(dim)
        push = runs, size, keys, vectors(dim), batch * heads
        spec = threads, KINDS[k.dtype]
        groups_xyz = _spread(provider, -(-invocations // threads))
        work.run(Dispatch("tile_moments", (source, mean, variance), groups_xyz, spec, push), fetch=(mean, variance))
        found = [lowering.read_rows(buffer, torch.Size(shape), torch.float32) for buffer in (mean, variance)]
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
        inputs = work.rows(chosen), work.rows(k), work.words(bits)
        result = work.empty(4 * chosen.shape[:3].numel() * key_tiles)
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
        inputs = [work.words(x.contiguous().numpy()) for x in arrays]
        kept = work.empty(4 * mass.numel())
        threads = 8 if provider.device.kind == "cpu" else 64
        push = rows, count, float_bits(max_kept)
        work.run(Dispatch("select_tiles", (*inputs, kept), _spread(provider, rows), (threads,), push), fetch=(kept,))
        return torch.from_numpy(lowering.read_words(kept, tuple(mass.shape), np.int32) != 0)


def elementwise_dispatch(
    provider: Provider, operation: str, a: Buffer, b: Buffer, result: Buffer, elements: int
) -> Dispatch:
    """`elementwise` on buffers of float32 rows."""
    count, threads = vectors(elements), _threads(provider)
    groups = _spread(provider, -(-count // threads))
    return Dispatch("elementwise", (a, b, result), groups, (threads, ELEMENTWISE[operation]), (count,))


def matmul_dispatch(
    provider: Provider, a: Buffer, b: Buffer, result: Buffer, sizes: tuple[int, int, int, int]
) -> Dispatch:
    """`matmul` on buffers of float32 rows; sizes (batch, rows, depth, columns), depth a multiple of 4."""
    batch, rows, depth, columns = sizes
    threads, each = (16, 4) if provider.device.kind == "cpu" else (256, 8) if min(rows, columns) > 512 else (128, 8)
    tile = threads // _MATMUL_LANES * each
    groups = -(-vectors(columns) // (2 * _MATMUL_LANES)), -(-rows // tile), batch
    return Dispatch("matmul", (a, b, result), groups, (threads, each), (rows, depth, vectors(columns)))


def _threads(provider: Provider) -> int:
    """Invocations of a workgroup whose invocations do not work together."""
    return 64 if provider.device.kind == "cpu" else 256


def _spread(provider: Provider, groups: int) -> tuple[int, int, int]:
    """So many workgroups, or a few more, along x and then y."""
    most = provider.device.max_groups[0]
    return min(groups, most), -(-groups // most), 1


def _row_bits(allowed: Tensor, key_tile: int) -> lowering.Words:
    """A mask (..., rows, keys) as bits, every tile in whole words: (..., rows, key_tiles, words)."""
    padded = torch.nn.functional.pad(allowed, (0, -allowed.shape[-1] % key_tile))
    return lowering.packed_bits(padded.unflatten(-1, (-1, key_tile)).numpy())
