"""Tiled attention on a Vulkan device from tensors on the CPU: q, k, v go over, the output comes back.

`vulkan_attention` has the contract of `gather_attention`. It computes in float32 from float32, bfloat16 or float16. A
call that the device has no room for is computed by the CPU kernel, with one warning.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aat_hf.kernels import cpu
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import attention
from aat_hf.vulkan.attention import Call
from aat_hf.vulkan.errors import OutOfDeviceMemoryError, VulkanLimitError
from aat_hf.vulkan.lowering import KINDS
from aat_hf.vulkan.provider import get_provider

_log = logging.getLogger("aat_hf")
_told: set[str] = set()


def vulkan_attention(
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
        q: (batch, heads, queries, head_dim), float32, bfloat16 or float16, on the CPU.
        k: (batch, kv_heads, keys, head_dim).
        v: (batch, kv_heads, keys, value_dim).

    Returns:
        output (batch, heads, queries, value_dim) in v's dtype and log-sum-exp (batch, heads, queries) in float32; a
        row without kept keys has output 0 and log-sum-exp -inf.

    Raises:
        ValueError: tensors that are not on the CPU. TypeError: other dtypes.
        VulkanUnavailableError: there is no usable Vulkan device.
    """
    found = vulkan_skip_attention(q, k, v, tile_map, mask, scale, softcap, -math.inf)
    return found.output, found.lse


def vulkan_skip_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tile_map: TileMap,
    mask: AttentionMask,
    scale: float,
    softcap: float | None = None,
    skip_below: float = -math.inf,
) -> cpu.SkippedTiles:
    """`vulkan_attention` with the skip rule of `aat_hf.kernels.cpu.cpu_skip_attention`.

    A workgroup's rows and 32 keys are what is left out together, so `skipped` has other pieces than the CPU kernel's.
    """
    _check(q, k, v)
    call = Call.of(tile_map, mask, scale, softcap, skip_below)
    try:
        return cpu.SkippedTiles(*_VulkanAttention.apply(q, k, v, call))  # type: ignore[no-untyped-call]
    except (OutOfDeviceMemoryError, VulkanLimitError) as error:
        _warn_once(error)
        return cpu.cpu_skip_attention(q, k, v, tile_map, mask, scale, softcap, skip_below)


class _VulkanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = attention.forward(get_provider(), q, k, v, call)
        ctx.save_for_backward(q, k, v, found.output, found.lse)
        ctx.call, ctx.skipped = call, found.skipped
        skipped = torch.from_numpy(found.skipped.pieces != 0).flatten(1)[: None if call.skips else 0]
        ctx.mark_non_differentiable(found.lost, skipped)
        return found.output, found.lse, found.lost, skipped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_lse: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        inputs, results = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        gradients = d_output, d_lse
        try:
            return *attention.backward(get_provider(), inputs, results, gradients, ctx.call, ctx.skipped), None
        except (OutOfDeviceMemoryError, VulkanLimitError) as error:
            if ctx.call.skips:
                raise
            _warn_once(error)
            nothing = torch.empty(0, 0, dtype=torch.uint8)
            numbers = ctx.call.query_tile, ctx.call.key_tile, ctx.call.scale, ctx.call.softcap, ctx.call.skip_below
            return *cpu.tiled_backward(*gradients, *inputs, *results, nothing, *ctx.call.tiles, *numbers), None


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if any(x.device.type != "cpu" for x in (q, k, v)):
        raise ValueError(
            f'backend "vulkan" takes tensors on the CPU; q, k, v are on {q.device}: use backend "auto", which computes '
            "where they are, or move them with .cpu()"
        )
    if q.dtype not in KINDS or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"the Vulkan kernel computes in float32 from float32, bfloat16 or float16; q, k, v are {q.dtype}, "
            f'{k.dtype}, {v.dtype}: convert them, or use backend="gather", which takes float64'
        )


def _warn_once(error: Exception) -> None:
    """Once for each kind of error."""
    if type(error).__name__ not in _told:
        _told.add(type(error).__name__)
        _log.warning("%s; the CPU kernel computes such calls instead", error)
