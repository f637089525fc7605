"""What the fine-tuning examples share: options, a Trainer run with its twin, numbers."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _texts import CODE_CHARACTERS, LICENCES, Texts, rows_of

import aat_hf
from aat_hf.config import BACKENDS
from aat_hf.data import resolve_model

WEIGHTS = ("float32", "bfloat16", "float16")
CONTINUED_LEARNING_RATE = 5e-5  # from a checkpoint
LOADERS = 4  # processes that make batches while an accelerator trains


@dataclass(frozen=True)
class Outcome:
    """What one run measured.

    Attributes:
        trainer: With the trained model; the numbers are in its `state.log_history` as well.
        first, last: Training loss at the first and the last log, nats per token.
        held_out: Loss on the held-out rows, nats per token.
        step_ms: Median time of a step after the exact ones.
    """

    trainer: tf.Trainer
    first: float
    last: float
    held_out: float
    step_ms: float

    def logged(self, name: str) -> float | None:
        """The last value of a metric in the log."""
        return next((entry[name] for entry in reversed(self.trainer.state.log_history) if name in entry), None)


class StepTimes(tf.TrainerCallback):
    """Seconds of every training step, waiting for the accelerator if there is one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        _synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        _synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def training_parser(description: str | None, *, learning_rate: float = 1e-3) -> argparse.ArgumentParser:
    """The options of every script that trains; `learning_rate` is the default of a new model."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(new_learning_rate=learning_rate)
    parser.add_argument("--model", type=found, help="checkpoint to go on from (a small new model)")
    parser.add_argument("--text", default="code", help=f"{', '.join(LICENCES)} or a UTF-8 file (code)")
    parser.add_argument("--path", type=Path, help="WikiText on disk, as Parquet or text")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a row (%(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="rows in a step (%(default)s)")
    rates = f"{learning_rate:g}; from a checkpoint {CONTINUED_LEARNING_RATE:g}"
    parser.add_argument("--learning-rate", type=float, help=f"highest one ({rates})")
    parser.add_argument("--tolerance", type=float, default=0.05, help="probability that may be lost (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--characters", type=int, default=CODE_CHARACTERS, help="of --text code (%(default)s), whole modules"
    )
    sizes = parser.add_argument_group("size of a new model")
    for name, default in (("layers", 2), ("width", 128), ("heads", 2), ("vocabulary", 2048)):
        sizes.add_argument(f"--{name}", type=int, default=default, help="(%(default)s)")
    return parser


def found(model: str) -> str:
    """The folder of a model, or its name on the Hub if that answers."""
    return str(resolve_model(model))


def is_first() -> bool:
    """Whether this is the only process, or the first that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print, in the first process."""
    if is_first():
        print(text, flush=True)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that the fine-tuning examples share."""
    parser = training_parser(description)
    parser.add_argument(
        "--exact-steps",
        type=int,
        default=0,
        help="how many are exact first: new heads look everywhere (%(default)s)",
    )
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="that trains (auto: tiled where faster)")
    parser.add_argument("--held-out-rows", type=int, default=4, help="rows in the evaluation (%(default)s)")
    parser.add_argument("--compare", action="store_true", help="also train the dense twin from the same seed")
    parser.add_argument("--output", type=Path, help="folder for the model, its tokenizer and its log")
    parser.add_argument("--weights", default="float32", choices=WEIGHTS, help="as which they are saved (%(default)s)")
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; steps that would all be exact are refused."""
    args = parser.parse_args(argv)
    if not 0 <= args.exact_steps < args.steps:
        parser.error(f"--exact-steps {args.exact_steps}: must leave some of the {args.steps} --steps")
    return args


def finetune(
    args: argparse.Namespace, make: Callable[[str], Any], texts: Texts, tokenizer: Any, collator: Any, *, pack: bool
) -> Outcome:
    """Train with "aat", and the dense twin if asked for; print and write what was measured. The run with "aat".

    Args:
        args: Of `parser_of`.
        make: Gives a model with the attention implementation it is called with.
        texts: Documents.
        tokenizer: Of the model.
        collator: Makes batches.
        pack: As of `rows_of`.
    """
    rows = rows_of(texts, tokenizer, args, pack=pack)
    aat = train(args, make, "aat", rows, tokenizer, collator)
    if args.output is not None:
        save(args, aat, texts)
    dense = None
    if args.compare:
        dense = train(args, make, "sdpa", rows, tokenizer, collator)
        if args.output is not None:
            save_log(dense, args.output / "dense")
    show(args, aat, dense, rows)
    return aat


def train(
    args: argparse.Namespace, make: Callable[[str], Any], attention: str, rows: Texts, tokenizer: Any, collator: Any
) -> Outcome:
    """Train a model and evaluate it on the held-out rows.

    `attention` is "aat", or "sdpa" for the dense twin: the same seed, the same rows in the same order.
    """
    say(f"{args.steps} steps with {attention}")
    tf.set_seed(args.seed)
    model = make(attention)
    check_length(args, model)
    aat_hf.configure(model, tolerance=args.tolerance, backend=args.backend)
    times = StepTimes()
    trainer = tf.Trainer(
        model,
        _arguments(args, attention),
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[times, *([callback(args)] if attention == "aat" else [])],
    )
    trainer.train()
    step_ms = 1e3 * statistics.median(times.seconds[args.exact_steps :])
    trainer.log({"step_ms": step_ms})
    tf.set_seed(args.seed)  # a collator that draws masks draws the same ones for the twin
    held_out = trainer.evaluate()["eval_loss"]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(trainer, losses[0], losses[-1], held_out, step_ms)


def check_length(args: argparse.Namespace, model: tf.PreTrainedModel) -> None:
    """End the process when a row has more tokens than the model has positions."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", args.tokens)
    if args.tokens > positions:
        name = args.model or "the new model"
        sys.exit(f"{name} has {positions} positions: give at most as many --tokens, not {args.tokens}")


def learning_rate_of(args: argparse.Namespace) -> float:
    """The highest one: as given, or the default of a new model or of a checkpoint."""
    return float(args.learning_rate or (CONTINUED_LEARNING_RATE if args.model else args.new_learning_rate))


def callback(args: argparse.Namespace) -> aat_hf.AATCallback:
    """Logs the tiling, and sets the tolerance after the exact steps."""

    def tolerance(progress: float) -> float:
        return 0.0 if round(progress * args.steps) < args.exact_steps else float(args.tolerance)

    return aat_hf.AATCallback(schedule=tolerance) if args.exact_steps else aat_hf.AATCallback()


def save(args: argparse.Namespace, aat: Outcome, texts: Texts) -> None:
    """Write model, tokenizer, log and held-out text to `--output`."""
    aat.trainer.model.config.use_cache = True  # the Trainer turns it off
    aat_hf.configure(aat.trainer.model, backend="auto")  # where it is used decides anew
    aat.trainer.model.to(getattr(torch, args.weights))
    aat.trainer.save_model(args.output)
    save_log(aat, args.output)
    if is_first():
        (args.output / "held_out.txt").write_text("\n".join(texts.held_out["text"]), "utf-8")
    say(f"wrote        {args.output}")


def save_log(outcome: Outcome, folder: Path) -> None:
    """Write the log of a run to `folder`."""
    if is_first():
        folder.mkdir(exist_ok=True)
        outcome.trainer.state.save_to_json(folder / "trainer_state.json")


def show(args: argparse.Namespace, aat: Outcome, dense: Outcome | None, rows: Texts) -> None:
    """Print what was measured."""
    model = aat.trainer.model
    say(f"{type(model).__name__}, {model.num_parameters() / 1e6:.2f} million parameters, on {model.device}")
    say(f"{args.text}: {len(rows.train)} rows of {args.tokens} tokens, {len(rows.held_out)} held out")
    for name, one in (("aat", aat), ("dense", dense)):
        if one is not None:
            say(
                f"{name:<12} loss {one.first:.4f} to {one.last:.4f}   held out {one.held_out:.4f}   "
                f"{one.step_ms:.1f} ms per step (median of {args.steps - args.exact_steps})"
            )
    say(f"density      {aat.logged('aat_density'):.3f}, tolerance {args.tolerance:g}")
    lost, half_width = aat.logged("aat_infidelity"), aat.logged("aat_infidelity_ci")
    say("infidelity   0: nothing was tiled" if lost is None else f"infidelity   {lost:.4f} ± {half_width:.4f}")
    tiled, faster = aat.logged("aat_tiled_calls"), aat.logged("aat_router_dense_calls")
    say(f"calls        {tiled:.0%} tiled; {faster:.0%} exact because that is faster")
    if not tiled and args.tolerance:
        say(f"to see tiles {remedy(args, bool(faster))}")


def remedy(args: argparse.Namespace, faster: bool) -> str:
    """What to change in a run that tiled nothing; `faster`: because exact attention was."""
    if not faster:
        return "give more --tokens: such rows are exact"
    if args.model is None:
        return "go on from a trained model (--model): the heads of a new one look everywhere"
    return "give more --tokens, or name the backend (--backend)"


def _arguments(args: argparse.Namespace, attention: str) -> tf.TrainingArguments:
    accelerated = torch.accelerator.is_available()
    folder = args.output or Path(tempfile.gettempdir(), "aat-finetuning")  # which the Trainer makes
    return tf.TrainingArguments(
        output_dir=str(folder if attention == "aat" else folder / "dense"),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=1,
        learning_rate=learning_rate_of(args),
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        bf16=accelerated,
        dataloader_pin_memory=accelerated,
        dataloader_num_workers=LOADERS if accelerated else 0,
        logging_steps=max(1, args.steps // 20),
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        disable_tqdm=not sys.stderr.isatty(),
    )


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
