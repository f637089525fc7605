"""Config of GPT-2 with adaptive tiled attention."""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config

from .configuration_aat import AATConfigMixin


class AATGPT2Config(AATConfigMixin, GPT2Config):
    """`GPT2Config` with the fields of `AATConfigMixin`.

    Dropout of attention weights needs exact attention, so a new config has none; that of a checkpoint stays.
    """

    model_type = "aat-gpt2"

    attn_pdrop: float | int = 0.0
    aat: dict[str, Any] | None = None
    learn_curvature: bool = False
