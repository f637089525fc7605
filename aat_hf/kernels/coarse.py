"""The coarse level: each coarse tile stands as one key (its centroid) with its mean value and the bias ln n.

First order only: log sum_j exp(theta k_j) >= ln n + theta mu (Jensen), so a coarse tile never outweighs the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.layout import group_heads, tile_keys
from aat_hf.tiling.tile_map import COARSE, TileMap


def coarse_attention(
    q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, scale: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the centroids of the coarse tiles: output and log-sum-exp, as `gather_attention`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    start = torch.arange(tile_map.shape[3], device=k.device) * tile_map.key_tile
    size = (k.shape[2] - start).clamp(max=tile_map.key_tile)
    mean_key = tile_keys(k.to(dtype), tile_map.key_tile).sum(3) / size[:, None]
    mean_value = tile_keys(v.to(dtype), tile_map.key_tile).sum(3) / size[:, None]
    scores = scale * (group_heads(q.to(dtype), k.shape[1]) @ mean_key.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + size.to(dtype).log()).view(*q.shape[:3], -1)
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
