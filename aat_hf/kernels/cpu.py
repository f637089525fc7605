"""Tiled attention on the CPU: compiled loops over the exact tiles, as operators that autograd and torch.compile know.

`cpu_attention` has the contract of `gather_attention`. The map and the mask are lowered to five tensors, the operators
`aat_hf::tiled_forward` and `aat_hf::tiled_backward` run the loops of `cpu_forward` on torch's number of threads.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from aat_hf.kernels import cpu_backward, cpu_forward
from aat_hf.kernels.cpu_matrices import KEYS, Centroids, Grid, Matrix, Rule, whole_panels
from aat_hf.kernels.cpu_sums import reduce, sums_for
from aat_hf.kernels.cpu_threads import run
from aat_hf.kernels.lowered_tiles import lower_tiles
from aat_hf.kernels.simd_emit import PANEL
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import TileMap

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNKS = 16  # work items of a backward pass, if that many are not given by batch x kv_heads
_CHUNK_BYTES = 1 << 28  # ... as long as their sums of dK and dV fit here
_NO_FLOATS, _NO_NUMBERS = np.empty((0, 0), np.float32), np.empty(0, np.int64)
NO_CENTROIDS = Centroids(_NO_NUMBERS, _NO_NUMBERS, _NO_FLOATS, _NO_FLOATS)


class SkippedTiles(NamedTuple):
    """What `cpu_skip_attention` computed.

    Attributes:
        output: (batch, heads, queries, value_dim); lse: (batch, heads, queries) of what was computed.
        lost: (batch, heads, queries) float32, an upper bound of the probability left out.
        skipped: (exact tiles, pieces) bool, the pieces (panel, block of keys) left out; no tiles when the rule is off.
    """

    output: Tensor
    lse: Tensor
    lost: Tensor
    skipped: Tensor


def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the exact tiles of `tile_map`; differentiable in q, k and v through both results.

    Args:
        q: (batch, heads, queries, head_dim), float32, bfloat16 or float16.
        k: (batch, kv_heads, keys, head_dim).
        v: (batch, kv_heads, keys, value_dim).

    Returns:
        output (batch, heads, queries, value_dim) in v's dtype and log-sum-exp (batch, heads, queries) in float32; a
        row without kept keys has output 0 and log-sum-exp -inf.
    """
    found = cpu_skip_attention(q, k, v, tile_map, mask, scale, softcap, -math.inf)
    return found.output, found.lse


def cpu_skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
    skip_below: float = -math.inf,
) -> SkippedTiles:
    """`cpu_attention` that leaves out what lies far below the running maximum.

    Tiles are visited in the order first, last, then backwards. A panel of queries leaves out a block of keys when for
    each of its rows the highest score there is below the running maximum by more than -skip_below.

    Gradients are those of what was computed; the bound has none.
    """
    check_inputs(q, k, v)
    tiles = lower_tiles(tile_map, mask)
    output, lse, lost, skipped = tiled_forward(
        q, k, v, *tiles, tile_map.query_tile, tile_map.key_tile, scale, softcap, skip_below
    )
    return SkippedTiles(output, lse, lost.detach(), skipped.bool())


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError or TypeError for devices and dtypes that the kernel does not take."""
    if q.device.type != "cpu":
        raise ValueError(
            f'backend "cpu" computes on the CPU; q, k, v are on {q.device}: use backend "auto" or "gather"'
        )
    if q.dtype not in KINDS or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"the CPU kernel computes in float32 from float32, bfloat16 or float16; q, k, v are {q.dtype}, {k.dtype}, "
            f'{v.dtype}: convert them, or use backend="gather", which takes float64'
        )


@torch.library.custom_op("aat_hf::tiled_forward", mutates_args=(), device_types="cpu")
def tiled_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None, skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp, bound of what was skipped, and which pieces were (see `cpu_forward.forward`)."""
    output, lse, lost, skipped = _forward_results(q, v, columns, query_tile, key_tile, skip_below)
    grid = as_grid(q, k, starts, columns, cuts, masks, query_tile, key_tile)
    compute(q, k, v, grid, NO_CENTROIDS, as_rule(scale, softcap, skip_below), output, lse, lost, skipped, lse)
    return output, lse, lost, skipped


def compute(
    q: Tensor, k: Tensor, v: Tensor, grid: Grid, centroids: Centroids, rule: Rule,
    output: Tensor, lse: Tensor, lost: Tensor, skipped: Tensor, lse_exact: Tensor,
) -> None:  # fmt: skip
    """Run the forward loop, which writes the last five; `lse_exact` only with centroids."""
    numbers = [x.view(-1).numpy() for x in (lse, lost)]
    keys = len(grid.columns) * grid.key_tile + len(centroids.columns)
    run(
        cpu_forward.forward, keys * grid.query_tile * (q.shape[-1] + v.shape[-1]), as_matrix(q), as_matrix(k),
        as_matrix(v), grid, centroids, rule, as_matrix(output), *numbers, skipped.zero_().numpy(),
        lse_exact.view(-1).numpy(),
    )  # fmt: skip


def _forward_results(
    q: Tensor, v: Tensor, columns: Tensor, query_tile: int, key_tile: int, skip_below: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pieces = -(-query_tile // PANEL) * -(-key_tile // KEYS)
    return (
        v.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty((columns.shape[0] if skip_below > -math.inf else 0, pieces), dtype=torch.uint8),
    )


@tiled_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None, skip_below: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _forward_results(q, v, columns, query_tile, key_tile, skip_below)


@torch.library.custom_op("aat_hf::tiled_backward", mutates_args=(), device_types="cpu")
def tiled_backward(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, skipped: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None, skip_below: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from those of output and log-sum-exp."""
    grid = as_grid(q, k, starts, columns, cuts, masks, query_tile, key_tile)
    rule = as_rule(scale, softcap, skip_below)
    return gradients(d_output, d_lse, q, k, v, output, lse, skipped, grid, NO_CENTROIDS, rule)[:3]


def gradients(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, skipped: Tensor,
    grid: Grid, centroids: Centroids, rule: Rule,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the backward loop: gradients of q, k, v, mean keys and mean values (batch, kv_heads, key_tiles, dim)."""
    d_q, d_k, d_v = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    edges, chunks = _chunks(torch.from_numpy(grid.starts), q, k, v)
    in_place = [x.dtype == torch.float32 and x.shape[-1] == whole_panels(x.shape[-1]) for x in (k, v)]
    sum_k, sum_v = (sums_for(x, chunks, own) for x, own in zip((d_k, d_v), in_place, strict=True))
    touched = np.zeros((len(edges) - 1, -(-k.shape[2] // grid.key_tile)), np.uint8)
    tiles = len(centroids.k) // (k.shape[0] * k.shape[1])
    sums_mean = [np.zeros((len(edges) - 1, tiles, total.first.shape[2]), np.float32) for total in (sum_k, sum_v)]
    inputs = [as_matrix(x) for x in (q, k, v, output, d_output.to(v.dtype))]
    rows = [x.detach().contiguous().view(-1).numpy() for x in (lse, d_lse)]
    sums = (edges.numpy(), as_matrix(d_q), sum_k, sum_v, touched, *sums_mean)
    keys = len(grid.columns) * grid.key_tile + len(centroids.columns)
    work = 5 * keys * grid.query_tile * max(q.shape[-1], v.shape[-1])
    run(cpu_backward.backward, work, *inputs, *rows, grid, centroids, rule, skipped.numpy(), *sums)
    for total, own, result in zip((sum_k, sum_v), in_place, (d_k, d_v), strict=True):
        work = 8 * (total.first.size + total.others.size)
        run(reduce, work, total, touched, k.shape[2], grid.key_tile, own, as_matrix(result))
    mean_k, mean_v = (x.reshape(*k.shape[:2], chunks, tiles, x.shape[2]).sum(2) for x in sums_mean)
    mean_k, mean_v = mean_k[..., : k.shape[3]], mean_v[..., : v.shape[3]]
    return d_q, d_k, d_v, torch.from_numpy(mean_k).contiguous(), torch.from_numpy(mean_v).contiguous()


@tiled_backward.register_fake
def _(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, lse: Tensor, skipped: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None, skip_below: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], output[0], output[1], output[3])
    ctx.numbers = inputs[7:]


def _gradients(ctx: Any, d_output: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, v, *tiles, output, lse, skipped = ctx.saved_tensors
    return *tiled_backward(d_output, d_lse, q, k, v, output, lse, skipped, *tiles, *ctx.numbers), *(None,) * 9


tiled_forward.register_autograd(_gradients, setup_context=_save)


def as_matrix(x: Tensor) -> Matrix:
    """Rows of the last dimension, sharing memory with `x` where it is contiguous."""
    rows = x.detach().contiguous().view(-1, x.shape[-1])
    kind = KINDS[x.dtype]
    if kind:
        return Matrix(np.empty((0, 0), np.float32), rows.view(torch.uint16).numpy(), kind)
    return Matrix(rows.numpy(), np.empty((0, 0), np.uint16), kind)


def as_grid(
    q: Tensor, k: Tensor, starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor, query_tile: int, key_tile: int
) -> Grid:
    """The lowered tiles of attention between q and k as the loops take them."""
    starts, columns, cuts, masks = (x.contiguous() for x in (starts, columns, cuts, masks))
    sizes = q.shape[1], k.shape[1], q.shape[2], k.shape[2], query_tile, key_tile
    return Grid(starts.numpy(), columns.numpy(), cuts.numpy(), masks.numpy(), *sizes)


def as_rule(scale: float, softcap: float | None, skip_below: float) -> Rule:
    """The numbers of `Rule` from natural units."""
    number, log2e = np.float32, 1 / math.log(2)
    skip = number(skip_below * log2e)
    if softcap is None:
        return Rule(number(scale * log2e), number(1), number(1), False, number(scale), skip)
    return Rule(number(1), number(scale / softcap), number(softcap * log2e), True, number(scale), skip)


def _chunks(starts: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
    """Edges of the backward pass's chunks of query tiles, as many for each head of k; depends on no thread count."""
    owners = k.shape[0] * k.shape[1]
    rows = (len(starts) - 1) // owners
    copy = 4 * owners * k.shape[2] * (whole_panels(k.shape[3]) + whole_panels(v.shape[3]))
    chunks = max(1, min(-(-_CHUNKS // owners), _CHUNK_BYTES // copy, rows))
    first = torch.arange(owners)[:, None] * rows
    begin, end = starts[first], starts[first + rows]
    edges = torch.searchsorted(starts, begin + (end - begin) * torch.arange(chunks) // chunks)
    return torch.cat([edges.clamp(min=first, max=first + rows).flatten(), torch.tensor([len(starts) - 1])]), chunks
