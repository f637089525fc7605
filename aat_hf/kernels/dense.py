"""Exact attention with every feature: PyTorch's SDPA where it can, else eager in pieces of rows; never N x N masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.masks import AttentionMask, IntervalMask

_CHUNK_ELEMENTS = 1 << 24  # mask or score elements held at a time


class Extras(NamedTuple):
    """Features of a call beyond q, k, v, mask and scale.

    Attributes:
        softcap: c in c * tanh(score / c).
        sinks: (heads,) logits of a virtual key without a value.
        bias: added to the scores, broadcastable to (batch, heads, queries, keys).
        dropout: probability of dropping an attention weight.
    """

    softcap: float | None = None
    sinks: Tensor | None = None
    bias: Tensor | None = None
    dropout: float = 0.0


class DenseResult(NamedTuple):
    """output (batch, heads, queries, value_dim); lse (batch, heads, queries) and weights where asked for."""

    output: Tensor
    lse: Tensor | None
    weights: Tensor | None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    scale: float,
    extras: Extras | None = None,
    need_lse: bool = False,
    need_weights: bool = False,
) -> DenseResult:
    """softmax attention over every allowed key; shapes as in `reference_attention`.

    A row without allowed keys gives output 0 and log-sum-exp -inf, with finite gradients.
    """
    extras = extras or Extras()
    plain = extras.softcap is None and extras.sinks is None and extras.bias is None
    if plain and not need_lse and not need_weights:
        return DenseResult(_sdpa(q, k, v, mask, scale, extras.dropout), None, None)
    step = q.shape[2] if need_weights else _rows_per_chunk(q, k)
    parts = [
        _eager_rows(q, k, v, mask, scale, extras, rows, need_weights)
        for rows in torch.arange(q.shape[2], device=q.device).split(max(1, step))
    ]
    if len(parts) == 1:  # a copy of the weights would lie beside the path of the gradient
        output, lse, weights = parts[0]
    else:
        output, lse, weights = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return DenseResult(output, lse, weights if need_weights else None)


def kind_for_sdpa(
    q: Tensor, k: Tensor, mask: AttentionMask | Tensor | None, is_causal: bool, extras: Extras
) -> str | None:
    """The `IntervalMask.kind` where one call of SDPA without a mask tensor is all of a call of several queries."""
    if extras.softcap is not None or extras.sinks is not None or extras.bias is not None or q.shape[2] == 1:
        return None
    if mask is None:
        return "full" if not is_causal else "causal" if q.shape[2] == k.shape[2] else None
    if is_causal or not isinstance(mask, IntervalMask) or mask.batch > 1:
        return None
    return mask.kind if (mask.queries, mask.keys) == (q.shape[2], k.shape[2]) else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, dropout: float) -> Tensor:
    if isinstance(mask, IntervalMask) and mask.kind is not None:
        return grouped_sdpa(q, k, v, None, scale, dropout, is_causal=mask.kind == "causal")
    if q.shape[2] > 1:  # once, not for every piece of rows
        k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    rows = torch.arange(q.shape[2], device=q.device)
    step = max(1, _CHUNK_ELEMENTS // (mask.batch * mask.heads * k.shape[2]))
    parts = []
    for part in rows.split(step):
        low, high = mask.key_range(part)
        high = max(high, low + 1)
        allowed = mask.rows(part)[..., low:high]
        alive = allowed.any(-1, keepdim=True)
        seen = k[:, :, low:high], v[:, :, low:high]
        out = grouped_sdpa(q[:, :, part], *seen, allowed | ~alive, scale, dropout)
        parts.append(torch.where(alive, out, torch.zeros((), dtype=out.dtype, device=out.device)))
    return torch.cat(parts, 2)


def grouped_sdpa(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, scale: float, dropout: float, is_causal: bool = False
) -> Tensor:
    """PyTorch's SDPA when k and v may have fewer heads than q; keys are repeated only where it needs that.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim); v: (batch, kv_heads, keys, value_dim).
        attn_mask: bool or additive (batch or 1, heads or 1, queries, keys).
    """
    how: dict[str, Any] = {"dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    batch, heads, queries, _ = q.shape
    if heads == k.shape[1]:
        return scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **how)
    if queries == 1:  # a decoding step: the heads that share keys become rows
        if attn_mask is not None and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], k.shape[1], -1, k.shape[2])
        rows = q.reshape(batch, k.shape[1], -1, q.shape[3])
        how["is_causal"] = False  # one query sees all
        return scaled_dot_product_attention(rows, k, v, attn_mask=attn_mask, **how).reshape(batch, heads, 1, -1)
    if attn_mask is None and q.shape[3] == v.shape[3] <= 256:  # what its fused kernels take
        return scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    return scaled_dot_product_attention(q, _repeat(k, heads), _repeat(v, heads), attn_mask=attn_mask, **how)


def weighted_values(weights: Tensor, v: Tensor) -> Tensor:
    """Output of `weights` (batch, heads, queries, keys) that lie on its gradient path; v (batch, kv_heads, keys, …)."""
    return weights @ _repeat(v, weights.shape[1])


def _eager_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    scale: float,
    extras: Extras,
    rows: Tensor,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = None if extras.bias is None else extras.bias.expand(*extras.bias.shape[:2], q.shape[2], k.shape[2])
    output, lse, weights = reference_attention(
        q[:, :, rows].to(dtype),
        k.to(dtype),
        v.to(dtype),
        mask.rows(rows),
        scale,
        extras.softcap,
        extras.sinks,
        None if bias is None else bias[:, :, rows].to(dtype),
    )
    weights = weights.to(q.dtype)
    if extras.dropout:
        weights = drop(weights, extras.dropout)
    if extras.dropout or (need_weights and dtype != q.dtype):  # weights handed out are those the output comes from
        output = weighted_values(weights, v)
    return output.to(v.dtype), lse, weights


def _rows_per_chunk(q: Tensor, k: Tensor) -> int:
    return _CHUNK_ELEMENTS // (q.shape[0] * q.shape[1] * k.shape[2])


def _repeat(x: Tensor, heads: int) -> Tensor:
    """Key/value heads repeated for SDPA: (batch, heads, keys, dim)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
