"""Callbacks whose numbers reach the history and every reporter (TensorBoard, W&B, trackio ...), not only the terminal.

The Trainer writes its history before it tells its callbacks of a log, and tells its reporters before a user's
callbacks: a callback that adds to the log then comes too late.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler


class MetricsCallback(TrainerCallback):
    """A callback that is asked for its metrics before a log goes out."""

    def __init__(self) -> None:
        _ask_before_reporters()

    def metrics(
        self, args: TrainingArguments, state: TrainerState, logs: dict[str, Any], model: Any
    ) -> dict[str, float]:
        """What to add to `logs`; called on every process."""
        raise NotImplementedError


def _ask_before_reporters() -> None:
    """Make the Trainer's handler ask `MetricsCallback`s first, once; Trainers without one do as before."""
    if getattr(CallbackHandler.on_log, "_asks", False):
        return
    on_log = CallbackHandler.on_log

    @functools.wraps(on_log)
    def asking(
        self: CallbackHandler,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> TrainerControl:
        for callback in self.callbacks:
            if isinstance(callback, MetricsCallback):
                found = callback.metrics(args, state, logs, self.model)
                logs.update(found)
                if found and state.log_history:
                    state.log_history[-1].update(found)
        return on_log(self, args, state, control, logs, **kwargs)

    asking._asks = True  # type: ignore[attr-defined]
    CallbackHandler.on_log = asking  # type: ignore[method-assign]
