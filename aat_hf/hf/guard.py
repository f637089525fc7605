"""Refusing models that would accept the name "aat" and then ignore it, or lose their mask."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from transformers import PreTrainedModel

_NAME = "aat"


def routes(model_class: type[PreTrainedModel]) -> bool:
    """Whether a class, or one it is derived from, calls attention through the library's interface."""
    parents = [c for c in model_class.__mro__ if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    return any(parent._can_set_attn_implementation() or _calls_interface(parent) for parent in parents)


def _calls_interface(model_class: type[PreTrainedModel]) -> bool:
    """Whether the module that defines the class (a notebook, say) has code that reads the interface's table."""
    names = vars(sys.modules.get(model_class.__module__, model_class)).values()
    functions = [f for c in names if inspect.isclass(c) for f in vars(c).values() if inspect.isfunction(f)]
    return any("ALL_ATTENTION_FUNCTIONS" in f.__code__.co_names for f in functions)


def refuse(model_class: type[PreTrainedModel]) -> None:
    """Raise ValueError if `model_class` would ignore attn_implementation="aat"."""
    if not routes(model_class):
        raise ValueError(
            f'{model_class.__name__} does not call its attention through the Transformers interface, so "aat" would '
            'be silently ignored. Use attn_implementation="eager" or "sdpa" for this model.'
        )


def _asked(model: PreTrainedModel, requested: str | dict[str, Any]) -> list[PreTrainedModel]:
    """The model and submodels that `set_attn_implementation(requested)` would give the name to."""
    if isinstance(requested, dict):
        return [model] if requested.get("") == _NAME else []
    if requested != _NAME:
        return []
    return [part for part in model.modules() if isinstance(part, PreTrainedModel)]


def install() -> None:
    """Check every model that is given the name "aat", at load and in `set_attn_implementation`; idempotent."""
    if getattr(PreTrainedModel.get_correct_attn_implementation, "_aat_guard", False):
        return
    check, change = PreTrainedModel.get_correct_attn_implementation, PreTrainedModel.set_attn_implementation

    @functools.wraps(check)
    def checked(self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False) -> str:
        if requested_attention == _NAME:
            refuse(type(self))
        return check(self, requested_attention, is_init_check)

    @functools.wraps(change)
    def changed(self: PreTrainedModel, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        for part in _asked(self, attn_implementation):
            refuse(type(part))
        change(self, attn_implementation, *args, **kwargs)

    checked._aat_guard = True  # type: ignore[attr-defined]
    PreTrainedModel.get_correct_attn_implementation = checked  # type: ignore[method-assign]
    PreTrainedModel.set_attn_implementation = changed  # type: ignore[method-assign]
