"""`aat bench quality`: what tiling does to a language model's predictions: NLL, KL and top-1 agreement with dense.

One dense pass over a text, then one tiled pass for every selector and tolerance, every layer as the router
decides: one whose maps keep nearly everything runs exactly. Times are those of one pass, recorded and audited.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aat_hf
from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, markdown_table, tokens_of, write_csv
from aat_hf.compare import Pass, quality, run_pass
from aat_hf.data.progress import notice, progress

TOLERANCES = (0.1, 0.05, 0.02, 0.01)
_FEW = 512  # tokens


@dataclass(frozen=True)
class QualityResult:
    """One tiled pass against the dense pass over the same text; nats per token, seconds in all layers' attention."""

    model: str
    text: str
    tokens: int
    selector: str
    tolerance: float
    settings: str
    density: float
    lost: float
    nll_dense: float
    nll_difference: float
    kl: float
    kl_p99: float
    top1_agreement: float
    select_seconds: float
    attention_seconds: float
    dense_seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench quality", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES))
    parser.add_argument("--selectors", nargs="+", default=["mix", "measured", "moments"])
    parser.add_argument(
        "--settings",
        type=json.loads,
        nargs="+",
        default=[{}],
        help='further AATConfig fields as JSON: {"coarse": true}',
    )
    parser.add_argument("--every", type=int, default=1, help="compare every so many positions")
    parser.add_argument("--out", type=Path, help="write a CSV with one line per pass to this file")
    _plots.add_option(parser, "KL against density")
    args = parser.parse_args(argv)
    _plots.check(args)
    results = run(args)
    print(f"{args.model}, {args.text}, {args.tokens} tokens; {environment()}\n")
    print(summary(results))
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    if args.plot is not None:
        points = [(f"{r.selector} {r.settings}".strip(), r.density, r.kl) for r in results]
        _plots.draw(args.plot, _plots.grouped(points), "density", "KL(dense ‖ aat), nats per token", log_y=True)
    return 0


def run(args: argparse.Namespace) -> list[QualityResult]:
    """One result for each selector, tolerance and settings."""
    model, tokenizer = load(args.model)
    input_ids = tokens_of(model, tokenizer, args.text, args.tokens)
    cases = [(s, t, more) for s in args.selectors for t in args.tolerances for more in args.settings]
    results = []
    with progress(f"{args.model}, {args.text}, {args.tokens} tokens", len(cases) + 1) as update:
        for more in args.settings:
            _compile(model, input_ids[:, :_FEW], more)
        dense = run_pass(model, input_ids, "sdpa")
        update(1)
        for number, (selector, tolerance, more) in enumerate(cases):
            results.append(_case(args, model, input_ids, dense, selector, tolerance, more))
            update(number + 2)
    return results


def _compile(model: Any, input_ids: Any, more: dict[str, Any]) -> None:
    """A short tiled pass, so that no pass that is timed compiles a kernel."""
    settings = aat_hf.AATConfig(tolerance=0.3).replace(**more).replace(min_length=0, dense_prefix=0)
    aat_hf.configure(model, **settings.to_dict())
    with aat_hf.record(model):
        run_pass(model, input_ids, "aat")


def _case(
    args: argparse.Namespace, model: Any, input_ids: Any, dense: Pass, selector: str, tolerance: float, more: Any
) -> QualityResult:
    settings = aat_hf.AATConfig(selector=selector, tolerance=tolerance).replace(**more)
    aat_hf.configure(model, **settings.to_dict())
    with aat_hf.record(model) as report:
        tiled = run_pass(model, input_ids, "aat")
    found = quality(model, input_ids, dense.hidden, tiled.hidden, every=args.every)
    select = report.milliseconds.get("select", 0.0) / 1e3
    return QualityResult(
        args.model, args.text, args.tokens, selector, tolerance, json.dumps(more) if more else "",
        report.density, report.infidelity[0], found.nll_dense, found.nll_difference, found.kl, found.kl_p99,
        found.top1_agreement, select, tiled.attention_seconds, dense.attention_seconds,
    )  # fmt: skip


def summary(results: Sequence[QualityResult]) -> str:
    """One line per pass."""
    head = ("selector", "tolerance", "settings", "density", "lost (audited)", "ΔNLL", "KL", "KL p99", "top-1",
            "select s", "attention s", "SDPA / attention")  # fmt: skip
    return markdown_table(head, [_cells(result) for result in results])


def _cells(r: QualityResult) -> list[str]:
    numbers = [f"{r.density:.3f}", f"{r.lost:.4f}", f"{r.nll_difference:+.4f}", f"{r.kl:.4f}", f"{r.kl_p99:.3f}"]
    times = [f"{r.select_seconds:.2f}", f"{r.attention_seconds:.2f}", f"{r.dense_seconds / r.attention_seconds:.2f}"]
    return [r.selector, f"{r.tolerance:g}", r.settings, *numbers, f"{r.top1_agreement:.3f}", *times]
