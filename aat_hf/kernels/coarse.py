"""The coarse level: each coarse tile stands as one key (its centroid) with its mean value and the bias ln n.

First order only: log sum_j exp(theta k_j) >= ln n + theta mu (Jensen), so a coarse tile never outweighs the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.layout import group_heads, tile_keys
from aat_hf.tiling.tile_map import COARSE, TileMap


def centroids(k: Tensor, v: Tensor, key_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sizes (key_tiles,), mean keys and mean values (batch, kv_heads, key_tiles, dim) of tiles, float32 or wider."""
    dtype = torch.promote_types(k.dtype, torch.float32)
    start = torch.arange(0, k.shape[2], key_tile, device=k.device)
    size = (k.shape[2] - start).clamp(max=key_tile)
    mean_key, mean_value = (tile_keys(x.to(dtype), key_tile).sum(3) / size[:, None] for x in (k, v))
    return size, mean_key, mean_value


def coarse_attention(
    q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the centroids of the coarse tiles: output and log-sum-exp, as `gather_attention`."""
    size, mean_key, mean_value = centroids(k, v, tile_map.key_tile)
    scores = scale * (group_heads(q.to(mean_key.dtype), k.shape[1]) @ mean_key.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + size.to(scores.dtype).log()).view(*q.shape[:3], -1)
    coarse = (tile_map.to_dense() == COARSE).repeat_interleave(tile_map.query_tile, 2)[:, :, : q.shape[2]]
    scores = scores.masked_fill(~coarse, float("-inf"))
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
    output = group_heads(weights, k.shape[1]) @ mean_value
    return output.view(*q.shape[:3], -1).to(v.dtype), lse


def merge_attention(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from (output, log-sum-exp) of each; associative."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    low = -1e30  # stands for -inf, so that empty rows have finite gradients
    lse_a, lse_b = lse_a.clamp(min=low), lse_b.clamp(min=low)
    lse = torch.logaddexp(lse_a, lse_b)
    output = torch.exp(lse_a - lse)[..., None] * out_a + torch.exp(lse_b - lse)[..., None] * out_b
    return output.to(out_a.dtype), lse.masked_fill(lse <= low / 2, float("-inf"))
