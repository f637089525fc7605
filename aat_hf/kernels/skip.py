"""Exact-ish attention: every score is computed, tiles far below the running maximum are skipped, the loss is bounded.

Tiles are visited in the order sink, diagonal, then backwards. A tile is skipped for a whole query tile when each of
its rows has its tile maximum below the running maximum by log(1 / epsilon). The probability a row loses is at most
sum over skipped tiles of n exp(tile maximum - log-sum-exp kept): a certificate, not an estimate.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.kernels.gather import gather_attention
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.measure import scores_by_tile
from aat_hf.tiling.tile_map import CULLED, EXACT, TileMap

_CHUNK_ELEMENTS = 1 << 24


class SkipResult(NamedTuple):
    """Attention of the tiles that were not skipped.

    Attributes:
        output: (batch, heads, queries, value_dim); lse: (batch, heads, queries) of what was computed.
        tile_map: the tiles not skipped.
        bound: (batch, heads, queries) certified upper bound of the lost probability.
    """

    output: Tensor
    lse: Tensor
    tile_map: TileMap
    bound: Tensor


def skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
) -> SkipResult:
    """Attention with the skip rule at epsilon = tolerance / 2; q, k, v as in `gather_attention`.

    On the CPU and through Vulkan the kernel decides while it computes, for a few queries and a block of keys at a time:
    finer than `tile_map` shows.
    """
    epsilon = config.tolerance / 2
    on_cpu = config.backend in ("auto", "cpu") and q.device.type == "cpu" and q.dtype != torch.float64
    if on_cpu or config.backend == "vulkan":
        if on_cpu:  # loaded when needed
            from aat_hf.kernels.cpu import cpu_skip_attention as kernel
        else:
            from aat_hf.kernels.vulkan import vulkan_skip_attention as kernel

        whole = TileMap.dense(mask, q.shape[0], q.shape[1], config.query_tile, config.key_tile)
        found = kernel(q, k, v, whole, mask, scale, softcap, math.log(max(epsilon, sys.float_info.min)))
        levels = whole.to_dense()
        gone = found.skipped.all(1)
        levels.view(-1, whole.shape[3])[whole.rows[gone], whole.columns[gone]] = CULLED
        kept = TileMap.from_dense(levels, whole.states, whole.query_tile, whole.key_tile)
        return SkipResult(found.output, found.lse, kept, found.lost)
    kept, bound = skip_map(q, k, mask, epsilon, config.query_tile, config.key_tile, scale, softcap)
    return SkipResult(*gather_attention(q, k, v, kept, mask, scale, softcap), kept, bound)


@torch.no_grad()
def skip_map(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    epsilon: float,
    query_tile: int,
    key_tile: int,
    scale: float,
    softcap: float | None = None,
) -> tuple[TileMap, Tensor]:
    """Which tiles the skip rule keeps at `epsilon`, and the certificate (batch, heads, queries)."""
    states = mask.tile_states(query_tile, key_tile)
    step = max(1, _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2] * query_tile)) * query_tile
    key_tiles = states.shape[3]
    kept, bound = [], []
    for rows in torch.arange(q.shape[2], device=q.device).split(step):
        scores = scores_by_tile(q, k, mask, rows, key_tile, scale, softcap)
        after = (0, key_tiles - scores.shape[3])
        top = torch.nn.functional.pad(scores.amax(-1), after, value=float("-inf"))
        mass = torch.nn.functional.pad(torch.logsumexp(scores, -1), after, value=float("-inf"))
        keep = _visit(top, query_tile, epsilon)  # [B, H, tiles, nk]
        row_keep = keep.repeat_interleave(query_tile, 2)[:, :, : len(rows)]
        lse = torch.logsumexp(mass.masked_fill(~row_keep, float("-inf")), -1, keepdim=True)
        lost = torch.exp(top - lse.nan_to_num(neginf=0.0)).masked_fill(row_keep, 0.0).sum(-1) * key_tile
        kept.append(keep)
        bound.append((lost / (1 + lost)).nan_to_num(nan=1.0))
    levels = torch.cat(kept, 2).to(torch.uint8) * EXACT
    return TileMap.from_dense(levels, states, query_tile, key_tile), torch.cat(bound, 2)


def _visit(top: Tensor, query_tile: int, epsilon: float) -> Tensor:
    """Keep decision (batch, heads, query_tiles, key_tiles) from the tile maxima (batch, heads, R, key_tiles)."""
    key_tiles = top.shape[-1]
    order = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(key_tiles - 1, 0, -1)]).to(top.device)
    ordered = top[..., order]
    running = torch.cummax(ordered, -1).values
    before = torch.nn.functional.pad(running[..., :-1], (1, 0), value=float("-inf"))
    below = ordered < before + (math.log(epsilon) if epsilon > 0 else float("-inf"))
    padding = -below.shape[2] % query_tile
    below = torch.nn.functional.pad(below, (0, 0, 0, padding), value=True).unflatten(2, (-1, query_tile)).all(3)
    below = below | (ordered == float("-inf")).all(2, keepdim=True)
    kept = torch.empty_like(below)
    kept[..., order] = ~below
    return kept
