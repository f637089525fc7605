"""A Trainer's own record of a run: what the card says about training is read from it."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aat_hf.bench._common import markdown_table
from aat_hf.publish.errors import PublishError

STATE = "trainer_state.json"
_TABLE_ROWS = 10


@dataclass(frozen=True)
class Training:
    """One finished run.

    Attributes:
        path: Of its trainer_state.json.
        steps: Optimizer steps done.
        log: `state.log_history`, one dict for every log.
    """

    path: Path
    steps: int
    log: list[dict[str, Any]]

    def last(self, name: str) -> float:
        """The last logged value of a metric.

        Raises:
            PublishError: It was never logged, or is not finite.
        """
        values = [entry[name] for entry in self.log if name in entry]
        if not values or not isinstance(values[-1], int | float) or not math.isfinite(values[-1]):
            found = f"its last value is {values[-1]}" if values else "it was never logged"
            raise PublishError(f"{self.path} gives no {name} ({found}): {_REMEDIES.get(name, 'train again')}")
        return float(values[-1])

    def has(self, name: str) -> bool:
        """Whether a metric was logged."""
        return any(name in entry for entry in self.log)

    def losses(self) -> dict[int, float]:
        """Training loss in nats per token by step."""
        return {entry["step"]: entry["loss"] for entry in self.log if "loss" in entry}

    def tolerances(self) -> dict[int, float]:
        """Tolerance by step, where it was logged; steps at 0 are exact."""
        return {entry["step"]: entry["aat_tolerance"] for entry in self.log if "aat_tolerance" in entry}

    @property
    def step_ms(self) -> float:
        """Mean time of a step, the start included, in milliseconds."""
        return 1e3 * self.last("train_runtime") / self.steps

    @property
    def tiled(self) -> bool:
        """Whether a call was tiled when attention was last measured."""
        return self.last("aat_tiled_calls") > 0


_REMEDIES = {
    "loss": "log at least one training step (TrainingArguments.logging_steps)",
    "eval_loss": "call trainer.evaluate() after training, before the state is saved",
    "train_runtime": "save the state after trainer.train() has returned (trainer.save_state())",
    "aat_density": "train with callbacks=[aat_hf.AATCallback()]",
    "aat_tiled_calls": "train with callbacks=[aat_hf.AATCallback()]",
    "aat_tolerance": "train with callbacks=[aat_hf.AATCallback()]",
}


def read_training(folder: Path) -> Training:
    """The run whose trainer_state.json lies in the folder.

    Raises:
        PublishError: It is missing or damaged, or the run did not end with losses of training and evaluation.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text("utf-8"))
        training = Training(path, int(state["global_step"]), list(state["log_history"]))
    except FileNotFoundError as error:
        raise PublishError(f"no {path}: save the Trainer's state there (trainer.save_state())") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{path} is no Trainer's state ({error!r}): save it again (trainer.save_state())") from error
    if training.steps < 1:
        raise PublishError(f"{path} is of a run without a step: train first")
    for name in ("loss", "eval_loss", "train_runtime"):
        training.last(name)
    return training


def loss_table(aat: Training, dense: Training | None) -> str:
    """Markdown: the training loss at up to ten logged steps, the last one included, the dense twin's beside it.

    A tolerance that changed during the run has a column.

    Raises:
        PublishError: The twin logged other steps.
    """
    columns = [aat.losses()] + ([dense.losses()] if dense is not None else [])
    if dense is not None and list(columns[0]) != list(columns[1]):
        raise PublishError(f"{dense.path} and {aat.path} log other steps: train the twin with the same arguments")
    steps = list(columns[0])
    count = min(_TABLE_ROWS, len(steps))
    shown = [steps[math.ceil(len(steps) * (row + 1) / count) - 1] for row in range(count)]
    head = ["step", "loss, aat", "loss, dense"][: 1 + len(columns)]
    rows = [[str(step), *(f"{column[step]:.4f}" for column in columns)] for step in shown]
    tolerances = aat.tolerances()
    if len(set(tolerances.values())) > 1:
        head.append("tolerance")
        rows = [
            [*row, f"{tolerances[step]:g}" if step in tolerances else "–"]
            for row, step in zip(rows, shown, strict=True)
        ]
    return markdown_table(head, rows)


def write_log(training: Training, path: Path) -> None:
    """The whole log as CSV, one line for every log, a column for every metric."""
    names = list(dict.fromkeys(name for entry in training.log for name in entry))
    names.sort(key=lambda name: name not in ("step", "epoch"))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(training.log)
