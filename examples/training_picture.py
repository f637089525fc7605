"""Train a GPT-2 with tiled attention and its dense twin, and draw what TensorBoard's event files hold of both.

    pip install -e '.[train,viz]'
    python examples/training_picture.py
    python examples/training_picture.py --model CHECKPOINT --start 0.2 --tolerance 0.05 --picture finetuning.png

Offline, on Python's own source, in about six minutes on one core of a server. docs/training.md shows the picture. The
heads of a new model look everywhere: a tolerance below .3 would keep all tiles, and nothing could be seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tf
from _errors import explained
from _finetuning import check_length, learning_rate_of, training_parser
from _texts import Texts, read_texts, rows_of, tokenizer_of
from finetune_gpt2 import load, new
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import aat_hf

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "training.png"
SETTINGS = {"backend": "cpu", "min_length": 0, "dense_prefix": 256}  # tiles where the router would take SDPA
LOGGED = 5  # steps between two logs
AVERAGED = 5  # logs at the start and at the end that are averaged for the summary


@dataclass(frozen=True)
class Curve:
    """One scalar of an event file: its values by step."""

    steps: list[int]
    values: list[float]

    @property
    def start(self) -> float:
        """Mean of the first logs."""
        return statistics.mean(self.values[:AVERAGED])

    @property
    def end(self) -> float:
        """Mean of the last logs."""
        return statistics.mean(self.values[-AVERAGED:])


def main(argv: Sequence[str] | None = None) -> None:
    parser = training_parser(__doc__, learning_rate=2e-3)
    parser.set_defaults(layers=4, tokens=2048, steps=200, tolerance=0.3)
    parser.add_argument("--held-out-rows", type=int, default=8, help="rows in the evaluation (%(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the event files (a temporary one)")
    parser.add_argument("--start", type=float, default=0.5, help="first tolerance; a cosine leads to the last (0.5)")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="the PNG (docs/images/training.png)")
    args = parser.parse_args(argv)
    texts = read_texts(args.text, args.path, args.characters)
    tokenizer = tokenizer_of(args, texts)
    rows = rows_of(texts, tokenizer, args, pack=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or Path(scratch)
        curves = {name: train(args, name, rows, tokenizer, folder / name) for name in ("aat", "sdpa")}
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(curves["aat"], curves["sdpa"]).savefig(args.picture, dpi=130)
    show(args, curves["aat"], curves["sdpa"])


def train(args: argparse.Namespace, attention: str, rows: Texts, tokenizer: Any, folder: Path) -> dict[str, Curve]:
    """Train from the seed with one attention implementation: the curves of the event file, by tag."""
    tf.set_seed(args.seed)
    model = load(args.model, attention) if args.model else new(args, tokenizer, attention)
    check_length(args, model)
    aat_hf.configure(model, **SETTINGS)
    callback = aat_hf.AATCallback(tolerance=args.tolerance, start=args.start, schedule="cosine")
    arguments = tf.TrainingArguments(
        output_dir=str(folder),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=1,
        learning_rate=learning_rate_of(args),
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=LOGGED,
        report_to=["tensorboard"],
        save_strategy="no",
        seed=args.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = tf.Trainer(
        model,
        arguments,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=tf.default_data_collator,
        callbacks=[callback] if attention == "aat" else [],
    )
    trainer.train()
    trainer.evaluate()
    return read_events(folder)


def read_events(folder: Path) -> dict[str, Curve]:
    """The scalars of the event files of one run, by tag: one file of the training, one of the evaluation after it."""
    (run,) = {file.parent for file in folder.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(run)).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        scalars = events.Scalars(tag)
        found[tag] = Curve([one.step for one in scalars], [one.value for one in scalars])
    return found


def draw(aat: dict[str, Curve], dense: dict[str, Curve]) -> Figure:
    """Loss of both; density of the tiles; infidelity beside the tolerance that the schedule sets."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    loss, density, infidelity = figure.subplots(1, 3)
    for name, curves, style in (("dense (SDPA)", dense, "k-"), ("aat", aat, "C0--")):
        loss.plot(curves["train/loss"].steps, curves["train/loss"].values, style, label=name)
    loss.set(title="training loss", ylabel="nats per token")
    heads = [aat[f"train/aat_density_{quantile}"].values for quantile in ("p10", "p90")]
    steps = aat["train/aat_density"].steps
    density.fill_between(steps, *heads, alpha=0.25, label="p10 to p90 of the heads")
    density.plot(steps, aat["train/aat_density"].values, label="mean")
    density.set(title="density: tiles computed", ylim=(0, 1.02))
    measured, half_width = aat["train/aat_infidelity"], aat["train/aat_infidelity_ci"]
    tolerance = aat["train/aat_tolerance"]
    infidelity.plot(tolerance.steps, tolerance.values, "k-", label="tolerance (cosine schedule)")
    infidelity.errorbar(
        measured.steps, measured.values, half_width.values, fmt="C0.", ms=4, lw=1, label="audited infidelity, 95 %"
    )
    infidelity.set(title="infidelity, mean over heads", ylim=(0, None))
    for axes in (loss, density, infidelity):
        axes.set_xlabel("step")
        axes.legend(fontsize=8)
    return figure


def show(args: argparse.Namespace, aat: dict[str, Curve], dense: dict[str, Curve]) -> None:
    """Print the numbers of the picture; "start" and "end" are means over five logs."""
    print(f"{args.steps} steps of {args.batch} x {args.tokens} tokens; tolerance {args.start:g} to {args.tolerance:g}")
    for name, curves in (("aat", aat), ("dense", dense)):
        loss = curves["train/loss"]
        print(f"{name:<10} loss {loss.start:.4f} to {loss.end:.4f}   held out {curves['eval/loss'].values[-1]:.4f}")
    pairs = zip(aat["train/loss"].values, dense["train/loss"].values, strict=True)
    print(f"largest difference of the logged losses  {max(abs(a - b) for a, b in pairs):.4f}")
    for tag in ("density", "infidelity", "heads_over_tolerance"):
        curve = aat[f"train/aat_{tag}"]
        print(f"{tag:<20} {curve.start:.4f} to {curve.end:.4f}")
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    with explained():
        main()
