"""Config of BERT with adaptive tiled attention."""

from __future__ import annotations

from typing import Any

from transformers import BertConfig

from .configuration_aat import AATConfigMixin


class AATBertConfig(AATConfigMixin, BertConfig):
    """`BertConfig` with the fields of `AATConfigMixin`.

    Dropout of attention weights needs exact attention, so a new config has none; that of a checkpoint stays.
    """

    model_type = "aat-bert"

    attention_probs_dropout_prob: float | int = 0.0
    aat: dict[str, Any] | None = None
    learn_curvature: bool = False
