"""The attention function "aat" of Transformers: translates a model's call, runs it, tells the recorders."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from aat_hf.errors import UnsupportedAttentionError
from aat_hf.hf.compiled import compiled_attention
from aat_hf.hf.guard import install
from aat_hf.hf.masks import aat_mask, from_argument
from aat_hf.hf.operator import run_layer
from aat_hf.hf.short import exact_at_once
from aat_hf.hf.space import lifted
from aat_hf.kernels.dense import Extras

_active_collector: Any = None  # what a model collects while it runs
with suppress(ImportError):
    from transformers.utils.output_capturing import _active_collector

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
    if not weights_wanted and not torch.compiler.is_compiling():
        extras = Extras(softcap, sinks, position_bias, dropout)
        output = exact_at_once(module, query, key, value, attention_mask, scale, extras)
        if output is not None:
            return output.transpose(1, 2).contiguous(), None
    query, key = lifted(module, query, key)
    if torch.compiler.is_compiling():
        return compiled_attention(
            module,
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
    result = run_layer(
        module,
        query,
        key,
        value,
        mask,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        bias=bias,
        dropout=dropout,
        need_weights=weights_wanted,
    )
    return result.output.transpose(1, 2).contiguous(), result.weights


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
    collector: Any = None if _active_collector is None else _active_collector.get()
    return bool(collector) and any(name.endswith("attentions") for name in collector)
