"""Where a model's settings live: the plain dict `config.aat`, changed by `configure`, read at every call."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from aat_hf.config import AATConfig

_VARIABLES = tuple(f"AAT_{field.name.upper()}" for field in dataclasses.fields(AATConfig))
_known: dict[tuple[str, int | None, tuple[tuple[str, str], ...]], AATConfig] = {}
_MOST_KNOWN = 4096


def configure(target: nn.Module | PreTrainedConfig, **changes: Any) -> AATConfig:
    """Change the settings of a model (or model config) and return those now in force.

    They are kept as a plain dict in `config.aat` (of the config and its nested ones), so `save_pretrained` and
    `from_pretrained` carry them.

    Raises:
        ValueError: an unknown field or a value out of range; nothing is changed.
    """
    configs = list(_configs(target))
    if not configs:
        raise TypeError(f"{type(target).__name__} has no Transformers config: pass a model or a config")
    settings = AATConfig.from_dict(getattr(configs[0], "aat", None) or {}).replace(**changes)
    defaults = AATConfig().to_dict()
    stored = {name: value for name, value in settings.to_dict().items() if value != defaults[name]}
    for config in configs:
        config.aat = dict(stored)
    return settings


def settings_of(config: Any, layer_idx: int | None = None) -> AATConfig:
    """The settings in force for one layer: `config.aat`, then its layer override, then the environment.

    Environment variables are those the process had at its first call.
    """
    stored = getattr(config, "aat", None) or {}
    key = (repr(stored), layer_idx, environment())  # the dict may have been changed in place
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST_KNOWN:  # a schedule changes the tolerance at every step
            _known.clear()
        found = _known[key] = _settings(stored, layer_idx)
    return found


def _settings(stored: dict[str, Any], layer_idx: int | None) -> AATConfig:
    settings = AATConfig.from_dict(stored).for_layer(layer_idx)
    return settings.with_environment() if environment() else settings


@lru_cache(maxsize=1)
def environment() -> tuple[tuple[str, str], ...]:
    """The overrides of this process, read once: a look at the environment costs as much as a short call."""
    return tuple((name, value) for name, value in os.environ.items() if name in _VARIABLES)


def _configs(target: nn.Module | PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The config of `target` and every nested one, each once."""
    roots = [target] if isinstance(target, PreTrainedConfig) else [getattr(m, "config", None) for m in target.modules()]
    seen: set[int] = set()
    while roots:
        config = roots.pop(0)
        if not isinstance(config, PreTrainedConfig) or id(config) in seen:
            continue
        seen.add(id(config))
        yield config
        roots += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
