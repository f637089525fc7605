"""Checking what a caller hands over, with errors that name argument, value and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.masks import AttentionMask, IntervalMask, TensorMask, causal_mask, full_mask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise TypeError or ValueError unless q, k and v fit together (shapes as in `tiled_attention`)."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {type(x).__name__}: must be a torch.Tensor")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {x.dtype}: must be one of {', '.join(map(str, _DTYPES))}")
        shape = x.shape
        if len(shape) != 4:
            raise ValueError(f"{name} has shape {tuple(shape)}: must be (batch, heads, length, head_dim)")
        if 0 in shape:
            raise ValueError(f"{name} has shape {tuple(shape)}: no dimension may be 0")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"dtypes of q, k, v are {q.dtype}, {k.dtype}, {v.dtype}: must be equal")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on {q.device}, {k.device}, {v.device}: must be one device")
    misfit = _misfit(q.shape, k.shape, v.shape)
    if misfit is not None:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: {misfit}")


def _misfit(q: torch.Size, k: torch.Size, v: torch.Size) -> str | None:
    if q[0] != k[0] or k[:3] != v[:3]:
        return "batch, and the kv_heads and keys of k and v, must be equal"
    if q[1] % k[1]:
        return "heads must be a multiple of kv_heads"
    return "q and k must have the same head_dim" if q[3] != k[3] else None


def as_mask(
    q: Tensor, k: Tensor, attn_mask: AttentionMask | Tensor | None, is_causal: bool, bias: Tensor | None
) -> tuple[AttentionMask, Tensor | None]:
    """The mask of a call and its additive bias (None unless there is one)."""
    queries, keys = q.shape[2], k.shape[2]
    causal = causal_mask(queries, keys, q.device) if is_causal else None
    if attn_mask is None:
        return causal or full_mask(queries, keys, q.device), bias
    if isinstance(attn_mask, AttentionMask):
        if is_causal:
            raise ValueError("is_causal=True with an AttentionMask: put causality into the mask")
        if (attn_mask.queries, attn_mask.keys) != (queries, keys):
            raise ValueError(
                f"attn_mask is for {attn_mask.queries} x {attn_mask.keys}: q and k have {queries} x {keys}"
            )
        if attn_mask.batch not in (1, q.shape[0]) or attn_mask.heads not in (1, q.shape[1]):
            raise ValueError(
                f"attn_mask is for batch {attn_mask.batch} and {attn_mask.heads} heads: q has {q.shape[0]} and "
                f"{q.shape[1]}; 1 stands for all of them"
            )
        return attn_mask, bias
    return _tensor_mask(q, k, attn_mask, causal, bias)


def _tensor_mask(
    q: Tensor, k: Tensor, attn_mask: Tensor, causal: IntervalMask | None, bias: Tensor | None
) -> tuple[AttentionMask, Tensor | None]:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    try:
        tensor = attn_mask[(None,) * (4 - attn_mask.ndim)]
        torch.broadcast_shapes(tensor.shape, shape)
        tensor = tensor.expand(*tensor.shape[:2], *shape[2:])
    except (RuntimeError, IndexError, AttributeError) as error:
        described = tuple(getattr(attn_mask, "shape", ())) or type(attn_mask).__name__
        raise ValueError(f"attn_mask {described}: must broadcast to {shape}") from error
    if tensor.device != q.device:
        raise ValueError(f"attn_mask is on {tensor.device}: must be on {q.device} as q")
    if tensor.dtype != torch.bool:
        tensor, additive = split_additive(tensor)
        if additive is not None:
            bias = additive if bias is None else bias + additive
    if causal is not None:
        tensor = tensor & causal.rows(torch.arange(shape[2], device=q.device))
    return TensorMask(tensor), bias


def split_additive(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """An additive mask as (may attend, bias or None): values at or below half the dtype's minimum forbid."""
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"attn_mask has dtype {tensor.dtype}: must be bool or floating point")
    allowed = tensor > torch.finfo(tensor.dtype).min / 2
    rest = tensor.masked_fill(~allowed, 0.0)
    return allowed, rest if tensor.requires_grad or bool((rest != 0).any()) else None
