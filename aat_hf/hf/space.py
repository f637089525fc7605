"""The geometry of one layer's attention: its queries and keys lifted before anything else sees them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aat_hf.geometry.lift import lift
from aat_hf.hf import operator
from aat_hf.hf.settings import settings_of


def lifted(module: nn.Module, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """`query` (batch, heads, queries, head_dim) and `key` (batch, kv_heads, keys, head_dim) in the layer's geometry.

    The curvature is that of `module.aat_curvature`, where a model class has put one to be learnt, else the settings'.

    Raises:
        NotImplementedError: curved attention is compiled with a torch whose tracer cannot read the layer's settings.
    """
    if torch.compiler.is_compiling() and not operator.SUPPORTED:
        if "geometry" in str(getattr(getattr(module, "config", None), "aat", None)):
            raise NotImplementedError("torch.compile with a geometry needs torch 2.13: update, or do not compile")
        return query, key
    geometry, curvature = _space(module)
    learnt = getattr(module, "aat_curvature", None)
    return lift(query, key, geometry, curvature if learnt is None else learnt())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _space(module: nn.Module) -> tuple[str, float | None]:
    config = settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    return config.geometry, config.curvature
