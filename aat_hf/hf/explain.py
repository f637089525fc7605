"""`explain(model)`: what each attention layer will run, and why, before a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from aat_hf.config import AATConfig
from aat_hf.hf.settings import settings_of
from aat_hf.kernels import router


@dataclass(frozen=True)
class LayerPlan:
    """What one attention layer will run: path "tiled", "skip", "dense" or "other", and why."""

    name: str
    layer_idx: int | None
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name:<40} {self.path:<6} {self.reason}"


class Explanation(list[LayerPlan]):
    """Plans of all attention layers; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no attention layers found"


def explain(model: nn.Module, length: int = 8192) -> Explanation:
    """What every attention layer of `model` will do with `length` tokens in one forward pass."""
    plans = Explanation()
    for name, module in model.named_modules():
        if _is_attention(module):
            config = module.config
            index = getattr(module, "layer_idx", None)
            implementation = getattr(config, "_attn_implementation", None)
            if implementation != "aat":
                reason = f'its attention implementation is {implementation!r}: model.set_attn_implementation("aat")'
                plans.append(LayerPlan(name, index, "other", reason))
            else:
                plans.append(LayerPlan(name, index, *_expect(module, settings_of(config, index), length)))
    return plans


def _is_attention(module: nn.Module) -> bool:
    """An attention module of the library: named so, with a config, and no further attention inside."""
    named = "Attention" in type(module).__name__ and getattr(module, "config", None) is not None
    return named and not any("Attention" in type(child).__name__ for child in module.children())


def _expect(module: nn.Module, config: AATConfig, length: int) -> tuple[str, str]:
    window = getattr(module, "sliding_window", None)
    if config.mode == "dense":
        return "dense", 'mode is "dense"'
    if config.tolerance == 0:
        return "dense", "tolerance is 0"
    first = next(module.parameters(), torch.zeros(()))
    shortest = max(
        router.shortest(config, first.device, first.dtype, getattr(module, "head_dim", 64)), config.query_tile
    )
    if length < shortest:
        return "dense", f"{length} keys are fewer than min_length = {shortest}"
    if isinstance(window, int) and window <= config.dense_prefix:
        return "dense", f"its window of {window} keys is within dense_prefix = {config.dense_prefix}"
    dropout = getattr(module, "attention_dropout", getattr(module, "attn_dropout", 0.0))
    dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if module.training and isinstance(dropout, float) and dropout > 0:
        return "dense", f"dropout is {dropout} while training"
    space = "" if config.geometry == "euclidean" else f", {config.geometry} geometry"
    reason = f"tolerance {config.tolerance}, selector {config.selector!r}{space}; {_decoding(config, first.device)}"
    return config.mode, reason


def _decoding(config: AATConfig, device: torch.device) -> str:
    if device.type != "cpu" or config.coarse or config.backend not in ("auto", "cpu"):
        return "decoding single tokens is exact"
    return f"decoding single tokens is exact below {router.decode_from(config)} keys"
