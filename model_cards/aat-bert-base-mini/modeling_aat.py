"""What the adaptive tiled models share: learnable curvature, safetensors, no geometry that is silently ignored."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

try:
    from aat_hf.geometry.lift import default_curvature
    from aat_hf.hf.settings import settings_of
except ModuleNotFoundError as error:
    raise ImportError(
        "This model attends with adaptive tiles, which the package aat-hf provides: pip install aat-hf"
    ) from error


class HeadCurvature(nn.Module):
    """A learnable positive curvature for every head: softplus(raw), (heads,).

    Args:
        heads: number of key/value heads.
        start: first value of all of them.
    """

    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.raw = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every curvature to `start`."""
        init.constant_(self.raw, self.start + math.log(-math.expm1(-self.start)))  # the inverse of softplus

    def forward(self) -> Tensor:
        """The curvatures: (heads,)."""
        return nn.functional.softplus(self.raw)


class AATModelMixin:
    """Goes before a Transformers model class whose config has the fields of `AATConfigMixin`."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, HeadCurvature):
            module.reset_parameters()

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """The library's check, and a refusal of implementations that know no geometry."""
        name: str = super().get_correct_attn_implementation(requested_attention, is_init_check)  # type: ignore[misc]
        geometry = self.config.geometry  # type: ignore[attr-defined]
        if name != "aat" and geometry != "euclidean":
            raise ValueError(
                f'attention implementation "{name}" would ignore the geometry "{geometry}" of this model: use "aat" '
                '(with tolerance 0 for exact attention), or set config.geometry = "euclidean"'
            )
        return name

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As the library's; weights are read from safetensors unless `use_safetensors=False` is given."""
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As the library's; FSDP gives a model a class of its own, whose code would go to the Hub in place of this."""
        cls = type(self)
        self.__class__ = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__class__ = cls


def add_curvatures(model: nn.Module, config: Any, attention: tuple[type[nn.Module], ...]) -> None:
    """Give every curved layer of the classes `attention` a `HeadCurvature` if the config asks to learn them.

    Raises:
        ValueError: no layer is curved.
    """
    if not config.learn_curvature:
        return
    curved = 0
    for module in model.modules():
        settings = settings_of(config, getattr(module, "layer_idx", None))
        if isinstance(module, attention) and settings.geometry != "euclidean":
            head_dim = config.hidden_size // config.num_attention_heads
            start = settings.curvature or default_curvature(settings.geometry, head_dim)
            module.aat_curvature = HeadCurvature(config.num_attention_heads, start)
            curved += 1
    if not curved:
        raise ValueError('learn_curvature = True without a curved layer: set geometry="hyperbolic" or "spherical"')
