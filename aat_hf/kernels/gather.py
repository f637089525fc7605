"""Tiled attention in pure PyTorch, any device: gather the kept key tiles of query tiles that keep about as many.

Query tiles are sorted by the number of tiles they keep and processed in buckets, so that one batched product serves
many. The backward pass recomputes the weights from the saved log-sum-exp (Dao et al. 2022, FlashAttention), so memory
is linear in the sequence length in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aat_hf.tiling.layout import tile_keys
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import EXACT, TileMap

_BUCKET_SCORES = {"cpu": 2**20, "cuda": 2**25}  # they stay in the cache / fill the device
_TINY = 1e-30  # divisor of rows without keys; other rows total at least 1


@dataclass(frozen=True)
class Scores:
    """How a score is made: softcap(scale * q k) where the mask allows."""

    mask: AttentionMask
    scale: float
    softcap: float | None = None


@dataclass(frozen=True)
class _Bucket:
    """T query tiles with at most c kept key tiles each.

    Attributes:
        rows: (T,) row of the tile map: (b * heads + h) * query_tiles + i.
        columns: (T, c) key tiles, those whose positions must be checked first; 0 where `exists` is False.
        exists: (T, c) bool.
        checked: leading columns whose positions must be checked.
    """

    rows: Tensor
    columns: Tensor
    exists: Tensor
    checked: int


def gather_attention(
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
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        v: (batch, kv_heads, keys, value_dim).

    Returns:
        output (batch, heads, queries, value_dim) in v's dtype and log-sum-exp (batch, heads, queries) in float32 or
        wider; a row without kept keys has output 0 and log-sum-exp -inf.
    """
    output, lse = _GatherAttention.apply(q, k, v, tile_map, Scores(mask, scale, softcap))  # type: ignore[no-untyped-call]
    return output, lse


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap, how: Scores) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(q.dtype, torch.float32)
        q_tiles, k_tiles, v_tiles = _tiled(q, k, v, tile_map)
        output = torch.zeros(*q_tiles.shape[:2], v.shape[-1], dtype=dtype, device=q.device)
        lse = torch.full(q_tiles.shape[:2], float("-inf"), dtype=dtype, device=q.device)
        buckets = list(_buckets(tile_map, k.shape[2]))
        for bucket in buckets:
            key_rows = _key_rows(bucket, tile_map, k.shape[1])
            scores, _ = _scores(q_tiles, k_tiles, bucket, key_rows, tile_map, how, dtype)
            top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
            weights = scores.sub_(top).exp_()
            total = weights.sum(-1, keepdim=True)
            output[bucket.rows] = (weights @ _take(v_tiles, key_rows, dtype)) / total.clamp(min=_TINY)
            lse[bucket.rows] = (top + total.log())[..., 0]
        ctx.save_for_backward(q, k, v, output, lse)
        ctx.tile_map, ctx.how, ctx.buckets = tile_map, how, buckets
        return _untile(output.to(v.dtype), q), _untile(lse[..., None], q)[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, lse = ctx.saved_tensors
        tile_map, how, dtype = ctx.tile_map, ctx.how, output.dtype
        q_tiles, k_tiles, v_tiles = _tiled(q, k, v, tile_map)
        d_out = tile_keys(d_output.to(dtype), tile_map.query_tile).flatten(0, 2)
        d_row = tile_keys(d_lse.to(dtype)[..., None], tile_map.query_tile).flatten(0, 2)[..., 0]
        delta = (d_out * output).sum(-1) - d_row  # [B*H*nq, bq]
        d_q = torch.zeros(q_tiles.shape, dtype=dtype, device=q.device)
        d_k = torch.zeros(k_tiles.shape, dtype=dtype, device=q.device)
        d_v = torch.zeros(v_tiles.shape, dtype=dtype, device=q.device)
        for bucket in ctx.buckets:
            rows, key_rows = bucket.rows, _key_rows(bucket, tile_map, k.shape[1])
            scores, slope = _scores(q_tiles, k_tiles, bucket, key_rows, tile_map, how, dtype)
            weights = torch.exp(scores - lse[rows].nan_to_num(neginf=0.0)[..., None])
            d_scores = weights * (d_out[rows] @ _take(v_tiles, key_rows, dtype).mT - delta[rows][..., None])
            d_scores = d_scores * how.scale if slope is None else d_scores * slope * how.scale
            d_q[rows] = d_scores @ _take(k_tiles, key_rows, dtype)
            flat = key_rows.flatten()
            d_k.index_add_(0, flat, (d_scores.mT @ q_tiles[rows].to(dtype)).view(-1, *k_tiles.shape[1:]))
            d_v.index_add_(0, flat, (weights.mT @ d_out[rows]).view(-1, *v_tiles.shape[1:]))
        return (
            _untile(d_q, q).to(q.dtype),
            _untile(d_k, k).to(k.dtype),
            _untile(d_v, v).to(v.dtype),
            None,
            None,
        )


def _tiled(q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> tuple[Tensor, Tensor, Tensor]:
    """(batch * heads * tiles, tile, dim) of each."""
    return (
        tile_keys(q, tile_map.query_tile).flatten(0, 2),
        tile_keys(k, tile_map.key_tile).flatten(0, 2),
        tile_keys(v, tile_map.key_tile).flatten(0, 2),
    )


def _untile(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of `_tiled`: (batch, heads, length of `like`, dim)."""
    return x.reshape(*like.shape[:2], -1, x.shape[-1])[:, :, : like.shape[2]]


def _buckets(tile_map: TileMap, keys: int) -> Iterator[_Bucket]:
    rows, columns, exact = tile_map.rows, tile_map.columns, tile_map.levels == EXACT
    rows, columns, checked = rows[exact], columns[exact], tile_map.cut[exact]
    if keys % tile_map.key_tile:
        checked = checked | (columns == tile_map.shape[3] - 1)
    columns = columns[torch.argsort(rows * 2 + (~checked).long(), stable=True)]
    total = len(tile_map.row_start) - 1
    counts = torch.bincount(rows, minlength=total)
    starts = counts.cumsum(0) - counts
    checks = torch.bincount(rows[checked], minlength=total)
    order = counts.argsort(stable=True)
    order = order[counts[order] > 0]
    sizes = counts[order].tolist()
    scores = _BUCKET_SCORES.get(columns.device.type, 2**22)
    pairs, begin = scores // (tile_map.query_tile * tile_map.key_tile), 0
    while begin < len(sizes):
        end = begin + 1
        while end < len(sizes) and sizes[end] * (end + 1 - begin) <= pairs:
            end += 1
        slot = torch.arange(sizes[end - 1], device=columns.device)
        chosen = order[begin:end]
        exists = slot < counts[chosen][:, None]
        index = torch.where(exists, starts[chosen][:, None] + slot, 0)
        yield _Bucket(chosen, torch.where(exists, columns[index], 0), exists, int(checks[chosen].max()))
        begin = end


def _key_rows(bucket: _Bucket, tile_map: TileMap, kv_heads: int) -> Tensor:
    """Row of every kept key tile in (batch * kv_heads * key_tiles, key_tile, dim): (T, c)."""
    _, heads, query_tiles, key_tiles = tile_map.shape
    head = bucket.rows // query_tiles
    kv = head // heads * kv_heads + head % heads // (heads // kv_heads)
    return kv[:, None] * key_tiles + bucket.columns


def _take(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, c) tiles of (…, tile, dim) side by side: (T, c * tile, dim)."""
    return x.index_select(0, index.flatten()).to(dtype).view(len(index), -1, x.shape[-1])


def _scores(
    q_tiles: Tensor,
    k_tiles: Tensor,
    bucket: _Bucket,
    key_rows: Tensor,
    tile_map: TileMap,
    how: Scores,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Masked scores (T, query_tile, c * key_tile) and the softcap's derivative there (None without one)."""
    scores = (q_tiles[bucket.rows].to(dtype) * how.scale) @ _take(k_tiles, key_rows, dtype).mT
    slope = None
    if how.softcap is not None:
        capped = torch.tanh(scores / how.softcap)
        scores, slope = how.softcap * capped, 1 - capped.square()
    if bucket.checked:
        width = bucket.checked * tile_map.key_tile
        scores[..., :width].masked_fill_(~_inside(bucket, tile_map, how.mask), float("-inf"))
    if not bool(bucket.exists[0].all()):  # sorted by count: the first row has the most empty slots
        exists = bucket.exists.repeat_interleave(tile_map.key_tile, 1)[:, None]
        scores.masked_fill_(~exists, float("-inf"))
    return scores, slope


def _inside(bucket: _Bucket, tile_map: TileMap, mask: AttentionMask) -> Tensor:
    """The mask inside the checked columns: bool (T, query_tile, checked * key_tile)."""
    _, heads, query_tiles, _ = tile_map.shape
    head = (bucket.rows // query_tiles)[:, None, None]
    tile = (bucket.rows % query_tiles)[:, None]
    device = bucket.rows.device
    row = tile * tile_map.query_tile + torch.arange(tile_map.query_tile, device=device)
    key = bucket.columns[:, : bucket.checked, None] * tile_map.key_tile
    key = (key + torch.arange(tile_map.key_tile, device=device)).flatten(1)[:, None]
    q_index = row.clamp(max=mask.queries - 1)[..., None]
    return mask.allowed(head // heads, head % heads, q_index, key.clamp(max=mask.keys - 1)) & (key < mask.keys)
