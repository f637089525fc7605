"""Attention of one layer while torch.compile traces the model: no data-dependent shape, no graph break.

A layer that may tile calls the operator of `aat_hf.hf.operator`, anything else becomes exact attention in the graph.
The mask is the row intervals of a plain causal or bidirectional rule with padding; a tracer cannot see into other
rules, so these are evaluated to one table, as SDPA's masks are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from aat_hf.hf import operator
from aat_hf.hf.masks import LazyMask, bounds_of
from aat_hf.kernels.dense import grouped_sdpa, weighted_values
from aat_hf.kernels.reference import reference_attention

_TRANSPARENT = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
Intervals = tuple[Tensor, Tensor, Tensor | None]
"""First and one-past-last visible key of each row (batch or 1, queries), and valid keys (batch, keys) or None."""


def compiled_attention(
    module: nn.Module,
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
    """As `aat_hf.hf.interface.aat_attention`, traceable.

    Raises:
        NotImplementedError: a mask no graph can hold (a FlexAttention BlockMask).
    """
    sizes = query.shape[2], key.shape[2]
    tiles = not weights_wanted and not dropout and position_bias is None and _may_tile(module, *sizes)
    rows = _intervals(attention_mask, causal, *sizes, query.device) if tiles else None
    if rows is not None:
        return _tiled(module, query, key, value, rows, None, sinks, scale, softcap), None
    mask, bias = _table(attention_mask, causal, *sizes, query.device)
    if tiles and bias is None:
        return _tiled(module, query, key, value, (None, None, None), mask, sinks, scale, softcap), None
    if position_bias is not None:
        bias = position_bias if bias is None else bias + position_bias
    if softcap is None and sinks is None and not weights_wanted:
        return _sdpa(query, key, value, mask, bias, scale, dropout), None
    return _eager(query, key, value, mask, bias, scale, softcap, sinks, dropout, weights_wanted)


def _may_tile(module: nn.Module, queries: int, keys: int) -> bool:
    if not operator.SUPPORTED or queries == 1:
        return False
    return 0 <= operator.shortest_tiled(module) <= keys


def _tiled(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: tuple[Tensor | None, Tensor | None, Tensor | None],
    table: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    number = operator.layer_number(module)
    output = operator.attention(query, key, value, *rows, table, sinks, number, scale, softcap)
    return output.transpose(1, 2).contiguous()


def _intervals(attention_mask: Any, causal: bool, queries: int, keys: int, device: torch.device) -> Intervals | None:
    if attention_mask is None:
        ramp = torch.arange(1, queries + 1, device=device)[None]
        return torch.zeros_like(ramp), ramp if causal else torch.full_like(ramp, keys), None
    if not isinstance(attention_mask, LazyMask) or attention_mask.mask_function not in _TRANSPARENT:
        return None
    if attention_mask.shape[2] != queries or attention_mask.shape[3] != keys:
        return None
    bounds, padding = bounds_of(attention_mask), attention_mask.padding
    assert bounds is not None  # both rules are known
    if padding is not None:
        padding = padding[:, attention_mask.kv_offset : attention_mask.kv_offset + keys].bool()
    return *bounds, padding


def _table(
    attention_mask: Any, causal: bool, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """The mask as bool (batch or 1, heads or 1, queries or 1, keys), and its additive values if it has any."""
    mask = attention_mask.materialise() if isinstance(attention_mask, LazyMask) else attention_mask
    if mask is None and causal and queries > 1:
        ramp = torch.arange(keys, device=device)
        mask = (ramp[None, :] <= torch.arange(queries, device=device)[:, None])[None, None]
    if mask is None:
        mask = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"attention_mask is {type(mask).__name__}, which aat cannot compile: run the model without torch.compile, "
            "or pass a tensor"
        )
    if mask.ndim == 2:  # padding only: causality is the layer's own, the last query sees the last known key
        seen = min(mask.shape[1], keys)
        mask = torch.nn.functional.pad(mask[:, -keys:].bool(), (0, keys - seen))[:, None, None]
        if causal:
            mask = mask & torch.ones(queries, keys, dtype=torch.bool, device=device).tril(seen - queries)
    mask = mask[..., :keys].expand(-1, -1, queries, -1)
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> Tensor:
    alive = mask.any(-1, keepdim=True)
    allowed = mask | ~alive
    if bias is not None:
        allowed = bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
    output = grouped_sdpa(query, key, value, allowed, scale, dropout)
    return (output * alive).transpose(1, 2).contiguous()


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    wide = torch.promote_types(query.dtype, torch.float32)
    output, _, weights = reference_attention(
        query.to(wide), key.to(wide), value.to(wide), mask, scale, softcap, sinks, bias
    )
    weights = weights.to(query.dtype)
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    if dropout or (weights_wanted and wide != query.dtype):  # weights handed out are those the output comes from
        output = weighted_values(weights, value)
    output = output.to(value.dtype).transpose(1, 2).contiguous()
    return output, weights if weights_wanted else None
