"""Inputs and probes that several test modules share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def peaked(batch: int, heads: int, kv_heads: int, queries: int, keys: int, dim: int, dtype=torch.float32):
    """q, k, v whose attention is concentrated on few far tiles, so that a selector has something to drop."""
    k = torch.randn(batch, kv_heads, keys, dim, dtype=torch.float64)
    topic = torch.randn(batch, kv_heads, -(-keys // 48), dim, dtype=torch.float64).repeat_interleave(48, 2)[:, :, :keys]
    k = k * 0.3 + topic
    pick = (torch.randint(0, keys, (-(-queries // 16),)) // 96 * 96).repeat_interleave(16)[:queries]
    q = k[:, :, pick].repeat_interleave(heads // kv_heads, 1) * 1.5 + 0.1 * torch.randn(batch, heads, queries, dim)
    v = torch.randn(batch, kv_heads, keys, dim, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor made."""

    seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.seen = max(self.seen, leaf.numel())
        return out
