"""Masked eager attention in any dtype: the oracle every kernel is tested against, and its documentation."""

from __future__ import annotations

import torch
from torch import Tensor


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    allowed: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(scale * q k^T + bias over the allowed keys) v, written out.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim); heads is a multiple of kv_heads.
        v: (batch, kv_heads, keys, value_dim).
        allowed: bool, broadcastable to (batch, heads, queries, keys).
        scale: factor of q k^T.
        softcap: c in c * tanh(score / c), applied after the scale.
        sinks: (heads,) logits of a virtual key without a value.
        bias: added to the scores, broadcastable to (batch, heads, queries, keys).

    Returns:
        output (batch, heads, queries, value_dim), log-sum-exp (batch, heads, queries) and weights
        (batch, heads, queries, keys). A row without allowed keys has output 0 and log-sum-exp -inf.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = scale * (q @ k.mT)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores)[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])[..., : k.shape[2]]
    return weights @ v, lse, weights
