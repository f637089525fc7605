"""The coarse level on the CPU: the softmax of `cpu_forward` goes on over the centroids of the coarse tiles.

The centroids are made by torch; the operators `aat_hf::coarse_forward` and `aat_hf::coarse_backward` take them as
further keys and values and give them gradients, which autograd carries on to k and v.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aat_hf.kernels.coarse import centroids
from aat_hf.kernels.cpu import as_grid, as_rule, check_inputs, compute, gradients
from aat_hf.kernels.cpu_matrices import Centroids
from aat_hf.kernels.lowered_tiles import lower_tiles, rows_of
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import COARSE, TileMap


def cpu_coarse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over the exact tiles of `tile_map` and the centroids of its coarse ones (`coarse.coarse_attention`).

    Args:
        q: (batch, heads, queries, head_dim), float32, bfloat16 or float16.
        k: (batch, kv_heads, keys, head_dim).
        v: (batch, kv_heads, keys, value_dim).

    Returns:
        output (batch, heads, queries, value_dim) in v's dtype, log-sum-exp (batch, heads, queries) in float32, and the
        log-sum-exp of the exact tiles alone, which has no gradient.

    Raises:
        ValueError: tensors that are not on the CPU. TypeError: other dtypes.
    """
    check_inputs(q, k, v)
    tiles, (starts, columns, _) = lower_tiles(tile_map, mask), rows_of(tile_map, COARSE)
    _, mean_k, mean_v = centroids(k, v, tile_map.key_tile)
    output, lse, lse_exact = coarse_forward(
        q, k, v, mean_k, mean_v, *tiles, torch.from_numpy(starts), torch.from_numpy(columns),
        tile_map.query_tile, tile_map.key_tile, scale, softcap,
    )  # fmt: skip
    return output, lse, lse_exact.detach()


@torch.library.custom_op("aat_hf::coarse_forward", mutates_args=(), device_types="cpu")
def coarse_forward(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor, coarse_starts: Tensor, coarse_columns: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, log-sum-exp, and log-sum-exp of the exact tiles alone (see `cpu_forward.forward`)."""
    output, lse, lse_exact = _results(q, v)
    grid = as_grid(q, k, starts, columns, cuts, masks, query_tile, key_tile)
    rule = as_rule(scale, softcap, -math.inf)
    lost, skipped = torch.empty_like(lse), torch.empty(0, 0, dtype=torch.uint8)
    means = _centroids(mean_k, mean_v, coarse_starts, coarse_columns)
    compute(q, k, v, grid, means, rule, output, lse, lost, skipped, lse_exact)
    return output, lse, lse_exact


def _results(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lse, lse_exact = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    return v.new_empty(*q.shape[:3], v.shape[-1]), lse, lse_exact


@coarse_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor, coarse_starts: Tensor, coarse_columns: Tensor,
    query_tile: int, key_tile: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _results(q, v)


@torch.library.custom_op("aat_hf::coarse_backward", mutates_args=(), device_types="cpu")
def coarse_backward(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor, coarse_starts: Tensor, coarse_columns: Tensor,
    output: Tensor, lse: Tensor, query_tile: int, key_tile: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, mean_k and mean_v from those of output and log-sum-exp."""
    grid = as_grid(q, k, starts, columns, cuts, masks, query_tile, key_tile)
    means, rule = _centroids(mean_k, mean_v, coarse_starts, coarse_columns), as_rule(scale, softcap, -math.inf)
    nothing = torch.empty(0, 0, dtype=torch.uint8)
    return gradients(d_output, d_lse, q, k, v, output, lse, nothing, grid, means, rule)


@coarse_backward.register_fake
def _(
    d_output: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, mean_k: Tensor, mean_v: Tensor,
    starts: Tensor, columns: Tensor, cuts: Tensor, masks: Tensor, coarse_starts: Tensor, coarse_columns: Tensor,
    output: Tensor, lse: Tensor, query_tile: int, key_tile: int, scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_q, d_k, d_v, d_mean_k, d_mean_v = (x.new_empty(x.shape) for x in (q, k, v, mean_k, mean_v))
    return d_q, d_k, d_v, d_mean_k, d_mean_v


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:11], *output[:2])
    ctx.numbers = inputs[11:]


def _gradients(ctx: Any, d_output: Tensor, d_lse: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *coarse_backward(d_output, d_lse, *ctx.saved_tensors, *ctx.numbers), *(None,) * 10


coarse_forward.register_autograd(_gradients, setup_context=_save)


def _centroids(mean_k: Tensor, mean_v: Tensor, starts: Tensor, columns: Tensor) -> Centroids:
    k, v = (x.detach().contiguous().view(-1, x.shape[-1]).numpy() for x in (mean_k, mean_v))
    return Centroids(starts.contiguous().numpy(), columns.contiguous().numpy(), k, v)
