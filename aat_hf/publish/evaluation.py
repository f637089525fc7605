"""The CSV files of an evaluation as Markdown tables."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from aat_hf.bench._common import markdown_table
from aat_hf.evaluation.generation import TaskResult
from aat_hf.evaluation.predictions import PredictionResult
from aat_hf.evaluation.render import prediction_tables, task_table
from aat_hf.publish.errors import PublishError

_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


def evaluation_tables(folder: Path) -> dict[str, str]:
    """Every CSV file of the folder as Markdown, by the file's name.

    predictions.csv and tasks.csv of `aat eval` look as that command prints them, others as they are.

    Raises:
        PublishError: There is none, or one cannot be read or holds no result.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise PublishError(f"no CSV file in {folder}: evaluate the model first (aat eval --model ... --out {folder})")
    return {file.name: _table(file) for file in files}


def _table(file: Path) -> str:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        if not rows:
            raise ValueError("it has no rows")
        if file.name == "predictions.csv":
            return prediction_tables([_result(PredictionResult, row) for row in rows])
        if file.name == "tasks.csv":
            return task_table([_result(TaskResult, row) for row in rows])
        return markdown_table(list(rows[0]), [[_shown(cell) for cell in row.values()] for row in rows])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PublishError(f"{file} is no table of results ({error}): evaluate the model again") from error


def _result(kind: Any, row: dict[str, str]) -> Any:
    """A dataclass from one line that `write_csv` wrote."""
    return kind(**{field.name: _PARSERS[str(field.type)](row[field.name]) for field in fields(kind)})


def _shown(cell: str) -> str:
    try:
        return f"{float(cell):.4g}".replace("nan", "–")
    except ValueError:
        return cell
