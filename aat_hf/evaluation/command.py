"""`aat eval`: predictions and long-context tasks, dense against several tolerances; table, CSV, picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import aat_hf
from aat_hf.bench._common import MODELS, TEXTS, environment, load, tokens_of, write_csv
from aat_hf.data.progress import notice
from aat_hf.data.sources import optional_module
from aat_hf.evaluation.generation import TaskResult, evaluate_tasks
from aat_hf.evaluation.predictions import PredictionResult, evaluate_predictions
from aat_hf.evaluation.render import draw, prediction_tables, task_table
from aat_hf.evaluation.tasks import TASKS

TOLERANCES = (0.1, 0.05, 0.02)
_PREDICTIONS = "predictions"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--what", nargs="+", choices=[_PREDICTIONS, *TASKS], default=[_PREDICTIONS, *TASKS])
    parser.add_argument("--tokens", type=int, default=4096, help="length of the text and of the tasks (4096)")
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES))
    parser.add_argument("--settings", type=_settings, default={}, help='further AATConfig fields as JSON: {"seed": 1}')
    parser.add_argument("--text", default="code", help=f"for predictions: {', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--buckets", type=int, default=8, help="ranges of positions (8)")
    parser.add_argument("--examples", type=int, default=4, help="questions for each task (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (0)")
    parser.add_argument("--out", type=Path, help="folder for eval.md, CSV files and eval.png")


def _settings(text: str) -> Any:
    try:
        changes = json.loads(text)
        aat_hf.AATConfig.from_dict(changes)
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return changes


def run(args: argparse.Namespace) -> int:
    """Run the evaluation; the process's exit status."""
    if args.out is not None:
        optional_module("matplotlib", "viz")  # before the work, not after it
    model, tokenizer = load(args.model)
    settings = [aat_hf.AATConfig(**args.settings).replace(tolerance=tolerance) for tolerance in args.tolerances]
    predictions: list[PredictionResult] = []
    tasks: list[TaskResult] = []
    if _PREDICTIONS in args.what:
        input_ids = tokens_of(model, tokenizer, args.text, args.tokens)
        predictions = evaluate_predictions(model, input_ids, settings, args.buckets)
    if names := [name for name in args.what if name != _PREDICTIONS]:
        tasks = evaluate_tasks(
            model, tokenizer, names, settings, tokens=args.tokens, examples=args.examples, seed=args.seed
        )
    report = _report(args, predictions, tasks)
    print(report)
    if min([one.density for one in predictions] + [one.density for one in tasks], default=1.0) == 1:
        notice('nothing was tiled: give more --tokens, or a lower "min_length" in --settings')
    if args.out is not None:
        _write(args.out, report, predictions, tasks)
    return 0


def _report(args: argparse.Namespace, predictions: list[PredictionResult], tasks: list[TaskResult]) -> str:
    parts = [f"{args.model}, {args.tokens} tokens; {environment()}"]
    if predictions:
        parts.append(f"Next-token predictions, text: {args.text}\n\n{prediction_tables(predictions)}")
    if tasks:
        parts.append(f"Tasks, examples of each: {args.examples} (seed {args.seed})\n\n{task_table(tasks)}")
    return "\n\n".join(parts)


def _write(folder: Path, report: str, predictions: list[PredictionResult], tasks: list[TaskResult]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "eval.md").write_text(f"{report}\n", "utf-8")
    if predictions:
        write_csv(folder / "predictions.csv", predictions)
    if tasks:
        write_csv(folder / "tasks.csv", tasks)
    draw(predictions, tasks, folder / "eval.png")
    notice(f"Wrote {folder}")
