"""How a model is handed a cache: the argument's name changed in Transformers 5.24."""

from __future__ import annotations

import inspect
from typing import Any

import transformers as tf

_NAMES = inspect.signature(tf.LlamaForCausalLM.forward).parameters
NAME = "cache" if "cache" in _NAMES else "past_key_values"


def using(cache: Any) -> dict[str, Any]:
    """The keyword argument of a model's forward pass and of `generate`."""
    return {NAME: cache}
