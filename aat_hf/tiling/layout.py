"""The tile grid: sampled rows, GQA views, tiles that are always exact."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.tiling.masks import NONE, PARTIAL, AttentionMask


def tiles(length: int, tile: int) -> int:
    """Number of tiles of `length` positions."""
    return -(-length // tile)


def sampled_rows(queries: int, query_tile: int, stride: int, device: torch.device) -> Tensor:
    """Every `stride`-th row of every query tile: (query_tiles, rows per tile) int64.

    Rows past the end of a ragged last tile repeat the last row.
    """
    stride = min(stride, query_tile)
    start = torch.arange(0, queries, query_tile, device=device)
    within = torch.arange(stride // 2, query_tile, stride, device=device)
    return (start[:, None] + within).clamp(max=queries - 1)


def random_rows(queries: int, count: int, seed: int, device: torch.device, avoid: Tensor | None = None) -> Tensor:
    """One random row from each of `count` equal strata: sorted int64, at most `count` rows, none in `avoid`."""
    free = torch.ones(queries, dtype=torch.bool)
    if avoid is not None:
        free[avoid.flatten().cpu()] = False
    candidates = free.nonzero()[:, 0]
    if len(candidates) <= count:
        return candidates.to(device)
    generator = torch.Generator().manual_seed(seed)
    edges = torch.linspace(0, len(candidates), count + 1, dtype=torch.float64)
    pick = edges[:-1] + torch.rand(count, generator=generator, dtype=torch.float64) * edges.diff()
    return candidates[pick.long().clamp(max=len(candidates) - 1).unique()].to(device)


def control_rows(queries: int, config: AATConfig, device: torch.device) -> Tensor:
    """Random rows that check a map before it is used, none of them measured: (control_rows,) at most."""
    return torch.from_numpy(_checked_rows(queries, *_sizes(config))[0]).to(device)


def held_out_rows(queries: int, config: AATConfig, device: torch.device) -> Tensor:
    """Random rows for the audit, none of them used for the map: (audit_rows,) at most."""
    return torch.from_numpy(_checked_rows(queries, *_sizes(config))[1]).to(device)


def _sizes(config: AATConfig) -> tuple[int, int, int, int, int]:
    return config.query_tile, config.sample_stride, config.control_rows, config.audit_rows, config.seed


@lru_cache(maxsize=32)  # the layers of a model ask for the same rows; arrays, for tensors would be those of a mode
def _checked_rows(
    queries: int, query_tile: int, stride: int, controls: int, audited: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Control rows and rows for the audit."""
    cpu = torch.device("cpu")
    used = sampled_rows(queries, query_tile, stride, cpu).flatten()
    control = random_rows(queries, controls, seed, cpu, used)
    return control.numpy(), random_rows(queries, audited, seed + 1, cpu, torch.cat([used, control])).numpy()


def group_heads(x: Tensor, kv_heads: int) -> Tensor:
    """(batch, heads, rows, dim) -> (batch, kv_heads, heads // kv_heads * rows, dim): no key is repeated."""
    batch, heads, rows, dim = x.shape
    return x.reshape(batch, kv_heads, heads // kv_heads * rows, dim)


def tile_keys(x: Tensor, key_tile: int) -> Tensor:
    """(batch, kv_heads, keys, dim) -> (batch, kv_heads, key_tiles, key_tile, dim), the end padded with zeros."""
    padding = -x.shape[2] % key_tile
    if padding:
        x = torch.nn.functional.pad(x, (0, 0, 0, padding))
    return x.unflatten(2, (-1, key_tile))


def diagonal_tiles(mask: AttentionMask, query_tile: int, key_tile: int) -> tuple[Tensor, Tensor]:
    """First and last key tile the rows of each query tile stand at: two int64 (batch or 1, query_tiles)."""
    position = mask.positions()
    start = torch.arange(0, mask.queries, query_tile, device=mask.device)
    end = (start + query_tile - 1).clamp(max=mask.queries - 1)
    return position[:, start] // key_tile, position[:, end] // key_tile


def forced_tiles(mask: AttentionMask, states: Tensor, config: AATConfig) -> Tensor:
    """Tiles that are always exact: bool, the shape of `states` (batch or 1, heads or 1, query_tiles, key_tiles).

    Sink tiles, the local band around the diagonal, tiles cut by the mask, and all tiles of the query tiles that see
    at most `dense_prefix` keys.
    """
    column = torch.arange(states.shape[-1], device=states.device)
    low, high = diagonal_tiles(mask, config.query_tile, config.key_tile)
    reach = config.local_tiles
    band = (column >= low[..., None] - reach) & (column <= high[..., None] + reach)  # [B, nq, nk]
    visible = (states != NONE).sum(-1, keepdim=True)
    first_visible = (states != NONE).to(torch.uint8).argmax(-1, keepdim=True)
    sink = column < first_visible + config.sink_tiles
    short = visible * config.key_tile <= config.dense_prefix
    return (band[:, None] | sink | short | (states == PARTIAL)) & (states != NONE)
