"""`aat bench model`: a whole causal language model with SDPA and with aat: prefill, decoding, one training step.

Interleaved in one process. Prefill is also checked: the change in NLL is printed with the times.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import aat_hf
from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, markdown_table, tokens_of, write_csv
from aat_hf.bench._timing import Timing, interleaved
from aat_hf.compare import quality, run_pass
from aat_hf.data.progress import notice, progress

TASKS = ("prefill", "decode", "train")


@dataclass(frozen=True)
class ModelResult:
    """Seconds of one task (median, 20th, 80th percentile) with SDPA and with aat."""

    model: str
    task: str
    tokens: int
    tolerance: float
    density: float
    sdpa: float
    sdpa_p20: float
    sdpa_p80: float
    aat: float
    aat_p20: float
    aat_p80: float
    note: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench model", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["prefill"])
    parser.add_argument("--tolerance", type=float, default=aat_hf.AATConfig().tolerance)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write a CSV to this file")
    _plots.add_option(parser, "time against length")
    args = parser.parse_args(argv)
    _plots.check(args)
    model, tokenizer = load(args.model)
    aat_hf.configure(model, tolerance=args.tolerance)
    tasks = {"prefill": _prefill, "decode": _decode, "train": _train}
    results = []
    for tokens in args.tokens:
        input_ids = tokens_of(model, tokenizer, args.text, tokens)
        for task in args.tasks:
            with progress(f"{args.model}, {tokens} tokens, {task}", 0):
                results.append(tasks[task](args, model, input_ids))
    print(f"{args.model}, {args.text}; {environment()}\n")
    print(summary(results))
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    if args.plot is not None:
        points = [(r.task, float(r.tokens), r.sdpa / r.aat) for r in results]
        _plots.draw(args.plot, _plots.grouped(points), "tokens", "SDPA / aat", log_x=True, level=1.0)
    return 0


def _prefill(args: argparse.Namespace, model: Any, input_ids: Tensor) -> ModelResult:
    with aat_hf.record(model) as report:
        tiled = run_pass(model, input_ids, "aat").hidden
    found = quality(model, input_ids, run_pass(model, input_ids, "sdpa").hidden, tiled, every=4)
    times = interleaved({name: partial(run_pass, model, input_ids, name) for name in ("sdpa", "aat")},
                        args.rounds)  # fmt: skip
    note = f"ΔNLL {found.nll_difference:+.4f}, KL {found.kl:.4f}, lost {report.infidelity[0]:.4f}"
    return _result(args, "prefill", input_ids, report.density, times, note)


@torch.inference_mode()
def _decode(args: argparse.Namespace, model: Any, input_ids: Tensor, steps: int = 16) -> ModelResult:
    """`steps` tokens after a prefill; below `decode_from` keys both implementations compute single tokens exactly."""
    model.set_attn_implementation("aat")
    cache = DynamicCache(config=model.config)
    # Transformers 5.24 gave the argument a new name
    named = {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}
    model(input_ids, **named, logits_to_keep=1)

    def run(name: str) -> None:
        model.set_attn_implementation(name)
        for step in range(steps):
            model(input_ids[:, step : step + 1], **named)
        cache.crop(-steps)

    with aat_hf.record(model) as report:
        run("aat")
    times = interleaved({name: partial(run, name) for name in ("sdpa", "aat")}, args.rounds)
    note = "exact in both" if report.density == 1 else f"lost {report.infidelity[0]:.4f}"
    return _result(args, f"decode {steps}", input_ids, report.density, times, note)


def _train(args: argparse.Namespace, model: Any, input_ids: Tensor) -> ModelResult:
    """Forward and backward of the language model loss."""
    losses: dict[str, float] = {}

    def run(name: str) -> None:
        model.set_attn_implementation(name)
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        losses[name] = float(loss.detach())

    with aat_hf.record(model) as report:
        run("aat")
    times = interleaved({name: partial(run, name) for name in ("sdpa", "aat")}, args.rounds)
    note = f"loss {losses['sdpa']:.4f} and {losses['aat']:.4f}"
    return _result(args, "train", input_ids, report.density, times, note)


def _result(
    args: argparse.Namespace, task: str, input_ids: Tensor, density: float, times: dict[str, Timing], note: str
) -> ModelResult:
    sdpa, aat = times["sdpa"], times["aat"]
    return ModelResult(
        args.model, task, input_ids.shape[1], args.tolerance, density, sdpa.median, sdpa.p20, sdpa.p80,
        aat.median, aat.p20, aat.p80, note,
    )  # fmt: skip


def summary(results: Sequence[ModelResult]) -> str:
    """A Markdown table."""
    head = ("task", "tokens", "tolerance", "density", "SDPA s", "aat s (p20–p80)", "SDPA / aat", "")
    return markdown_table(
        head,
        [
            [r.task, str(r.tokens), f"{r.tolerance:g}", f"{r.density:.3f}", f"{r.sdpa:.2f}",
             f"{r.aat:.2f} ({r.aat_p20:.2f}–{r.aat_p80:.2f})", f"{r.sdpa / r.aat:.2f}", r.note]
            for r in results
        ],
    )  # fmt: skip
