"""Calls that can only be exact, sent to SDPA before anything else is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aat_hf.attention import why_dense
from aat_hf.hf.masks import LazyMask, interpret
from aat_hf.hf.settings import settings_of
from aat_hf.kernels import router
from aat_hf.kernels.dense import Extras, grouped_sdpa
from aat_hf.report.record import recorders_of
from aat_hf.tiling.masks import IntervalMask


def exact_at_once(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scale: float, extras: Extras
) -> Tensor | None:
    """Output (batch, heads, queries, value_dim) of a call whose shapes and settings forbid tiling, else None.

    At a few hundred keys every check is felt, so these are all: ordinary causal or full masks made by the mask
    function, no features beyond dropout, nobody listening.
    """
    if extras.softcap is not None or extras.sinks is not None or extras.bias is not None:
        return None
    kind = _kind(attention_mask, query, key)
    if kind is None or recorders_of(module) or torch.is_autocast_enabled(query.device.type):
        return None
    config = settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    if config.geometry != "euclidean":
        return None
    if query.shape[2] == 1 and key.shape[2] >= router.decode_from(config):
        return None
    if why_dense(query, key, config, extras) is None:
        return None
    return grouped_sdpa(query, key, value, None, scale, extras.dropout, kind == "causal")


def _kind(attention_mask: Any, query: Tensor, key: Tensor) -> str | None:
    """The `IntervalMask.kind` of a mask that fits these queries and keys."""
    if not isinstance(attention_mask, LazyMask) or attention_mask.device != query.device:
        return None
    if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        return None
    mask = interpret(attention_mask)
    return mask.kind if isinstance(mask, IntervalMask) else None
