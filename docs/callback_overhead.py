"""What `AATCallback` costs of a training step: python docs/callback_overhead.py.

One training of a small GPT-2 on Python's source. From one log to the next is a block of steps; the callback takes part
in every other one. Prints the median ratio of a block with it to the block without it before it. Needs "aat-hf[train]",
about ten minutes, and a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import aat_hf
from aat_hf.bench._common import environment
from aat_hf.config import BACKENDS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # where the training scripts are

from _finetuning import check_length, learning_rate_of, training_parser
from _texts import read_texts, rows_of, tokenizer_of
from finetune_gpt2 import load, new

UNCOUNTED = 2  # first blocks, which compile and load


class Blocks(tf.TrainerCallback):
    """Times the blocks of steps between two logs, and lets a callback take part in every other one.

    Attributes:
        seconds: With the callback in `seconds[True]`, without it in `seconds[False]`.
    """

    def __init__(self, watched: tf.TrainerCallback) -> None:
        self.watched, self.on = watched, True
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.trainer: tf.Trainer | None = None
        self._began = time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """End a block: by now the callback has given its metrics of it."""
        if self.trainer is None or "loss" not in (logs or {}):
            return
        now = time.perf_counter()
        self.seconds[self.on].append(now - self._began)
        self.on = not self.on
        handler = self.trainer.callback_handler
        others = [one for one in handler.callbacks if one is not self.watched]
        handler.callbacks = [*others, self.watched] if self.on else others
        self._began = time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """Train and print what was measured."""
    parser = training_parser(__doc__)
    parser.set_defaults(layers=4, steps=440, held_out_rows=0)  # nothing is evaluated
    parser.add_argument("--backend", default="auto", choices=BACKENDS, help="that trains (auto: tiled where faster)")
    parser.add_argument("--logging-steps", type=int, default=10, help="steps of a block (10)")
    args = parser.parse_args(argv)
    blocks = run(args)
    pairs = list(zip(blocks.seconds[True], blocks.seconds[False], strict=False))[UNCOUNTED:]
    if not pairs:
        sys.exit(f"too few blocks: give more --steps than {2 * (UNCOUNTED + 1) * args.logging_steps}")
    ratios = sorted(watched / plain for watched, plain in pairs)
    low, high = ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
    step_ms = 1e3 * statistics.median(plain for _, plain in pairs) / args.logging_steps
    print(f"{args.tokens} tokens a step, a log every {args.logging_steps} steps; {environment()}")
    print(f"a step without the callback: {step_ms:.0f} ms (median of {len(pairs)} blocks)")
    print(f"with / without: {statistics.median(ratios):.4f} (p20 {low:.4f}, p80 {high:.4f})")


def run(args: argparse.Namespace) -> Blocks:
    """Train; the times of the blocks."""
    texts = read_texts(args.text, args.path, args.characters)
    tokenizer = tokenizer_of(args, texts)
    rows = rows_of(texts, tokenizer, args, pack=True)
    tf.set_seed(args.seed)
    model = load(args.model, "aat") if args.model else new(args, tokenizer, "aat")
    check_length(args, model)
    aat_hf.configure(model, tolerance=args.tolerance, backend=args.backend, min_length=0)
    callback = aat_hf.AATCallback()
    blocks = Blocks(callback)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = tf.TrainingArguments(
            output_dir=scratch,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=learning_rate_of(args),
            logging_steps=args.logging_steps,
            report_to=[],
            save_strategy="no",
            dataloader_pin_memory=torch.accelerator.is_available(),
            seed=args.seed,
            disable_tqdm=True,
        )
        blocks.trainer = tf.Trainer(
            model,
            arguments,
            train_dataset=rows.train,
            data_collator=tf.default_data_collator,
            callbacks=[blocks, callback],
        )
        blocks.trainer.train()
    return blocks


if __name__ == "__main__":
    main()
