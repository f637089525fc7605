"""The attention function "aat" of Transformers: translates a model's call, runs it, tells the recorders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from aat_hf.attention import tiled_attention
from aat_hf.errors import UnsupportedAttentionError
from aat_hf.hf.guard import install
from aat_hf.hf.masks import LazyMask, aat_mask, from_argument
from aat_hf.hf.settings import settings_of
from aat_hf.kernels.reference import reference_attention
from aat_hf.report.record import recorders_of

NAME = "aat"


def register() -> None:
    """Register attention and mask function under "aat" and refuse models that would ignore the name; idempotent."""
    AttentionInterface.register(NAME, aat_attention)
    AttentionMaskInterface.register(NAME, aat_mask)
    install()


def aat_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, called by the model.

    Args:
        module: the layer's attention module; its `config.aat` holds the settings.
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); value: (batch, kv_heads, keys, value_dim).
        attention_mask: what the mask function made, a 2-D or 4-D tensor, or None.

    Returns:
        output (batch, queries, heads, value_dim), contiguous, and the weights (batch, heads, queries, keys) if the
        model collects attentions, else None.

    Raises:
        UnsupportedAttentionError: sparse index arguments or a paged cache.
    """
    _refuse(module, kwargs)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    sinks = s_aux if s_aux is not None else kwargs.get("sinks")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    query, key, value = _one_dtype(module, query, key, value)
    weights_wanted = _weights_wanted(kwargs)
    if torch.compiler.is_compiling():
        return _compiled(
            query,
            key,
            value,
            attention_mask,
            causal,
            scale,
            softcap,
            sinks,
            position_bias,
            dropout,
            weights_wanted,
        )
    shape = dict(batch=query.shape[0], heads=query.shape[1], queries=query.shape[2], keys=key.shape[2])
    mask, bias = from_argument(attention_mask, **shape, is_causal=causal, device=query.device)
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    recorders = recorders_of(module)
    config = settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    result = tiled_attention(
        query,
        key,
        value,
        config=config,
        attn_mask=mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        dropout=dropout,
        need_lse=False,
        need_weights=weights_wanted,
        audit=config.audit == "always" or (config.audit == "recorded" and bool(recorders)),
    )
    for recorder in recorders:
        recorder.add(module, result, query.shape[2], key.shape[2])
    return result.output.transpose(1, 2).contiguous(), result.weights


def _compiled(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    causal: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    position_bias: Tensor | None,
    dropout: float,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention that torch.compile can trace: no data-dependent shape, the mask as one tensor."""
    mask = attention_mask.materialise() if isinstance(attention_mask, LazyMask) else attention_mask
    queries, keys = query.shape[2], key.shape[2]
    if mask is None and causal and queries > 1:
        ramp = torch.arange(keys, device=query.device)
        mask = (ramp[None, :] <= torch.arange(queries, device=query.device)[:, None])[None, None]
    if mask is None:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device)
    if mask.ndim == 2:  # padding only: causality is the layer's own, the last query sees the last known key
        seen = min(mask.shape[1], keys)
        mask = torch.nn.functional.pad(mask[:, -keys:].bool(), (0, keys - seen))[:, None, None]
        if causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(seen - queries)
    mask = mask[..., :keys]
    bias = position_bias
    if mask.dtype != torch.bool:
        bias = mask if bias is None else mask + bias
        mask = mask > torch.finfo(mask.dtype).min / 2
    alive = mask.any(-1, keepdim=True)
    if softcap is None and sinks is None and not weights_wanted:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        allowed = mask | ~alive
        if bias is not None:
            allowed = bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
        output = scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale)
        return (output * alive).transpose(1, 2).contiguous(), None
    wide = torch.promote_types(query.dtype, torch.float32)
    output, _, weights = reference_attention(
        query.to(wide), key.to(wide), value.to(wide), mask, scale, softcap, sinks, bias
    )
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
        output = weights @ value.to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    output = output.to(value.dtype).transpose(1, 2).contiguous()
    return output, weights.to(query.dtype) if weights_wanted else None


def _refuse(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for name in ("indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttentionError(
                f"{type(module).__name__} chooses its keys itself ({name}); aat would silently ignore that. "
                'Use attn_implementation="eager" or "sdpa" for this model.'
            )
    if kwargs.get("cache") is not None:
        raise UnsupportedAttentionError(
            'continuous batching hands over a paged cache, which aat does not read. Use attn_implementation="sdpa" '
            "for generate_batch, or generate() with aat."
        )


def _one_dtype(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype for all three (autocast and adapters mix them); float32 where GPT-2 asks to upcast."""
    if getattr(module, "reorder_and_upcast_attn", False):
        return query.float(), key.float(), value.float()
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _weights_wanted(kwargs: dict[str, Any]) -> bool:
    """Whether the model collects attention weights in this call."""
    if kwargs.get("output_attentions"):
        return True
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return False
    collector = _active_collector.get()
    return bool(collector) and any(name.endswith("attentions") for name in collector)
