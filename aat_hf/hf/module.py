"""`QuantumGeometricAttention`: multi-head attention as a module, tiled, with its metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.config import AATConfig
from aat_hf.report.metrics import observables as observe


class QuantumGeometricAttention(nn.Module):
    """Multi-head self-attention whose tiles are chosen by measuring the state sqrt(softmax).

    Args:
        hidden_dim: width of the hidden states; a multiple of num_heads.
        num_heads: query heads.
        tile_size: rows of a query tile.
        num_kv_heads: key/value heads (grouped-query attention); default num_heads.
        is_causal: whether a position sees only itself and those before it.
        bias: whether the projections have a bias.
        config: further settings, any field of `AATConfig`.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        tile_size: int = 64,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
        **config: Any,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if hidden_dim <= 0 or num_heads <= 0 or hidden_dim % num_heads:
            raise ValueError(f"hidden_dim = {hidden_dim}: must be a positive multiple of num_heads = {num_heads}")
        if num_kv_heads <= 0 or num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads = {num_kv_heads}: must divide num_heads = {num_heads}")
        self.num_heads, self.num_kv_heads, self.is_causal = num_heads, num_kv_heads, is_causal
        self.head_dim = hidden_dim // num_heads
        self.config = AATConfig(query_tile=tile_size, **config)
        self.q_proj = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_dim, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_dim, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        self._last: TiledAttentionResult | None = None
        self._inputs: tuple[Tensor, Tensor | None] | None = None

    def forward(self, hidden_states: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Attend: (batch, length, hidden_dim) -> the same; `attn_mask` as in `tiled_attention`."""
        result = self._attend(hidden_states, attn_mask)
        self._inputs = (hidden_states.detach(), attn_mask)
        self._last = result
        projected: Tensor = self.o_proj(result.output.transpose(1, 2).flatten(2))
        return projected

    def get_metrics(self, observables: Iterable[str] = ()) -> dict[str, Any]:
        """Of the last forward pass: path, reason, density, expected and measured infidelity with its half width.

        Args:
            observables: names of `aat_hf.report.metrics` to add, as tensors (batch, heads) or (batch, heads, ...). The
                full attention weights are formed for them, with the parameters as they are now.

        Raises:
            RuntimeError: nothing was computed yet.
            ValueError: an unknown observable, or one that needs a tile map where nothing was tiled.
        """
        if self._last is None or self._inputs is None:
            raise RuntimeError("no metrics yet: call the module first")
        last = self._last
        exact = last.path == "dense"
        found: dict[str, Any] = {
            "path": last.path,
            "reason": last.reason,
            "density": 1.0 if last.tile_map is None else float(last.tile_map.density.mean()),
            "estimated_infidelity": 0.0 if last.estimated is None else float(last.estimated.mean()),
            "infidelity": (0.0 if exact else None) if last.audit is None else float(last.audit.mean.nanmean()),
            "infidelity_half_width": None if last.audit is None else float(last.audit.half_width.nanmean()),
        }
        wanted = list(observables)
        if wanted:
            with torch.no_grad():
                weights = self._attend(*self._inputs, need_weights=True).weights
            assert weights is not None  # asked for
            found.update(observe(weights, wanted, tile_map=last.tile_map, tile=self.config.key_tile))
        return found

    def _attend(
        self, hidden_states: Tensor, attn_mask: Tensor | None, need_weights: bool = False
    ) -> TiledAttentionResult:
        return tiled_attention(
            self._heads(self.q_proj(hidden_states), self.num_heads),
            self._heads(self.k_proj(hidden_states), self.num_kv_heads),
            self._heads(self.v_proj(hidden_states), self.num_kv_heads),
            config=self.config,
            is_causal=self.is_causal,
            attn_mask=attn_mask,
            need_lse=False,
            need_weights=need_weights,
        )

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)
