"""Predicting tile masses from key moments (Fisher metric), the sink and local tiles scored exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.tiling.layout import diagonal_tiles, group_heads, sampled_rows, tile_keys, tiles
from aat_hf.tiling.masks import AttentionMask, IntervalMask
from aat_hf.tiling.measure import RoughKeys, RowMasses, mean_over_query_tiles, normalised, on_cpu_kernels
from aat_hf.tiling.moments import Moments, log_mass


def predict_rows(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    moments: Moments,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> RowMasses:
    """Predicted probabilities of every tile for every `predict_stride`-th row, and the rows' log-sum-exp.

    Returns:
        R = query_tiles * rows per tile.
    """
    if on_cpu_kernels(mask, q):
        return RowMasses(*_on_cpu(q, k, mask, moments, config, scale, softcap, sinks))
    return normalised(_predicted_log_mass(q, k, mask, moments, config, scale, softcap), sinks)


def predict_query_tiles(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    moments: Moments,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rough: RoughKeys | None = None,
) -> Tensor:
    """Mean of `predict_rows` over the rows of each query tile: (batch, heads, query_tiles, key_tiles).

    Args:
        rough: of k, where an estimate will do; the moments are then rounded like the keys.
    """
    if on_cpu_kernels(mask, q):
        together = -(-config.query_tile // min(config.predict_stride, config.query_tile))
        return _on_cpu(q, k, mask, moments, config, scale, softcap, sinks, together, rough)[0]
    found = predict_rows(q, k, mask, moments, config, scale, softcap, sinks)
    return mean_over_query_tiles(found, tiles(q.shape[2], config.query_tile))


def _on_cpu(
    q: Tensor,
    k: Tensor,
    mask: IntervalMask,
    moments: Moments,
    config: AATConfig,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    together: int = 1,
    rough: RoughKeys | None = None,
) -> tuple[Tensor, Tensor]:
    from aat_hf.kernels import cpu_rows  # numba, loaded when needed

    rows = sampled_rows(q.shape[2], config.query_tile, config.predict_stride, q.device).flatten()
    band = config.query_tile, config.key_tile, config.local_tiles
    first = mask.known(("band", *band), lambda: _first_near(mask, *band))
    width = tiles(config.query_tile, config.key_tile) + 2 * config.local_tiles
    near = (moments, first, width, config.sink_tiles)
    return cpu_rows.measure_rows(q, k, mask, rows, config.key_tile, scale, softcap, *near, sinks, together, rough)


def _first_near(mask: IntervalMask, query_tile: int, key_tile: int, reach: int) -> Tensor:
    """First tile of each row's local band: int64 (batch or 1, queries)."""
    low, _ = diagonal_tiles(mask, query_tile, key_tile)
    return (low - reach).repeat_interleave(query_tile, 1)[:, : mask.queries]


def _predicted_log_mass(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    moments: Moments,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Predicted log mass of every tile for every `predict_stride`-th row.

    Returns:
        (batch, heads, query_tiles * rows per tile, key_tiles) float32; -inf where the mask hides the tile.
    """
    rows = sampled_rows(q.shape[2], config.query_tile, config.predict_stride, q.device)
    q_rows = q[:, :, rows.flatten()].to(moments.mean.dtype)
    far = log_mass(group_heads(q_rows, k.shape[1]), moments, scale, softcap)
    far = far.view(*q_rows.shape[:3], -1)
    size = moments.count.sum(-1)
    share = mask.counts(rows.flatten(), config.key_tile) / size  # cut tiles: fewer keys
    far = far + share.to(far).log()
    return _insert_exact(far, q_rows, k, mask, rows, config, scale, softcap)


def _insert_exact(
    far: Tensor,
    q_rows: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    config: AATConfig,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Replace the prediction of the sink tiles and the local band by exact tile log masses."""
    batch, heads, kv_heads = q_rows.shape[0], q_rows.shape[1], k.shape[1]
    query_tiles, per_tile = rows.shape
    key_tiles, key_tile = tiles(k.shape[2], config.key_tile), config.key_tile
    near = _near_tiles(mask, config, key_tiles).expand(batch, -1, -1)  # [B, nq, F]
    key = (near[..., None] * key_tile + torch.arange(key_tile, device=k.device)).flatten(2)  # [B, nq, F*kt]
    tile_index = near.flatten(1)[:, None, :, None, None].expand(-1, kv_heads, -1, key_tile, k.shape[3])
    k_near = tile_keys(k, key_tile).gather(2, tile_index).view(batch, kv_heads, query_tiles, -1, k.shape[3])
    q_tiles = q_rows.view(batch, kv_heads, -1, query_tiles, per_tile, q_rows.shape[3])
    scores = torch.einsum("bhgnpd,bhnfd->bhgnpf", q_tiles * scale, k_near.to(q_rows.dtype))
    scores = scores.reshape(batch, heads, query_tiles, per_tile, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    b = torch.arange(batch, device=k.device).view(-1, 1, 1, 1, 1)
    h = torch.arange(mask.heads, device=k.device).view(1, -1, 1, 1, 1)
    inside = mask.allowed(b, h, rows[None, None, :, :, None], key.clamp(max=k.shape[2] - 1)[:, None, :, None, :])
    inside = inside & (key < k.shape[2])[:, None, :, None, :]
    scores = scores.masked_fill(~inside, float("-inf")).unflatten(-1, (-1, key_tile))
    exact = torch.logsumexp(scores, -1)  # [B, H, nq, per, F]
    index = near[:, None, :, None, :].expand_as(exact)
    return far.unflatten(2, rows.shape).scatter(-1, index, exact).flatten(2, 3)


def _near_tiles(mask: AttentionMask, config: AATConfig, key_tiles: int) -> Tensor:
    """Key tiles scored exactly for each query tile (sink tiles, local band): int64 (batch or 1, query_tiles, F)."""
    low, _ = diagonal_tiles(mask, config.query_tile, config.key_tile)
    reach = config.local_tiles
    width = tiles(config.query_tile, config.key_tile)
    offset = torch.arange(-reach, width + reach, device=low.device)
    sink = torch.arange(config.sink_tiles, device=low.device).expand(*low.shape, -1)
    return torch.cat([sink, low[..., None] + offset], -1).clamp(0, key_tiles - 1)
