"""Synthetic inputs: concentrated attention, and tile maps of a given density."""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import EXACT, TileMap


def concentrated(
    keys: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (1, heads, keys, head_dim): keys in runs around common centres, neighbouring queries at one centre."""
    centres = torch.randn(1, heads, -(-keys // 64), head_dim).repeat_interleave(64, 2)[:, :, :keys]
    k = centres + 0.3 * torch.randn_like(centres)
    q = 2 * centres[:, :, torch.arange(keys) // 128 * 64]  # about half-way back, the same for 128 rows
    return q.to(device, dtype), k.to(device, dtype), torch.randn_like(k).to(device, dtype)


def random_map(q: Tensor, density: float, tile: int = 64) -> TileMap:
    """A causal map with about this density: first tile and diagonal kept, the others at random."""
    mask = causal_mask(q.shape[2], q.shape[2], q.device)
    states = mask.tile_states(tile, tile)
    tiles = states.shape[2]
    generator = torch.Generator().manual_seed(1)
    kept = torch.rand(*q.shape[:2], tiles, tiles, generator=generator) < density
    kept[..., 0] = True
    kept |= torch.eye(tiles, dtype=torch.bool)
    return TileMap.from_dense(kept.to(q.device, torch.uint8) * EXACT, states, tile, tile)
