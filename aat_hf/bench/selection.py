"""`aat bench selection`: the frontier of divergence against density and time, for selectors, settings and key orders.

For each scene, a model over a text: one dense pass, then one tiled pass for every method and tolerance, and what it
does to the predictions: NLL, KL and top-1 agreement with dense. A method is a selector with settings, every layer as
the router decides (one whose maps keep nearly everything runs exactly); its times are those of one pass, recorded and
audited. Or it is a key order, tried on whole attention matrices, which takes a minute and more and has no times.
With --all, one command for all of it: every scene, selector, setting and order; hours on two cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, markdown_table, tokens_of, write_csv
from aat_hf.bench._frontier_plot import draw_frontier
from aat_hf.bench._methods import Method, Settings, ablations, orders, whole
from aat_hf.bench._order_trial import ESTIMATES, Grouping
from aat_hf.compare import Pass, quality, run_pass
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress

Scene = tuple[str, str, int]
"""Model, text, tokens."""

SCENES: list[Scene] = [
    *(("smollm2", text, tokens) for tokens in (4096, 8192) for text in ("code", "prose")),
    ("qwen05", "code", 16384),
    ("gemma3", "code", 16384),
]
TOLERANCES = (0.1, 0.05, 0.02)
SELECTORS = ("mix", "measured", "moments", "oracle")
_WHOLE = 4096  # tokens up to which --ablations tries key orders: matrices of 64 MiB
_FEW = 512  # tokens


@dataclass(frozen=True)
class FrontierResult:
    """One tiled pass against the dense pass over the same text; nats per token, seconds in all layers' attention."""

    model: str
    text: str
    tokens: int
    method: str
    tolerance: float
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
    args = _arguments(argv)
    _plots.check(args)
    print(environment())
    results: list[FrontierResult] = []
    for scene in args.scene:
        here = run(args, scene)
        print(f"\n{_title(scene)}\n\n{summary(here)}", flush=True)
        results += here
        if args.out is not None:  # after every scene: one may take an hour
            write_csv(args.out, results)
            notice(f"Wrote {args.out}")
    if args.plot is not None:
        draw_frontier(args.plot, panels(results))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="aat bench selection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--scene",
        nargs=3,
        action="append",
        metavar=("MODEL", "TEXT", "TOKENS"),
        help=f"several times for several; MODEL: {', '.join(MODELS)}, a folder or a name on the Hub; TEXT: "
        f"{', '.join(TEXTS)} or a UTF-8 file (default: smollm2 code 4096)",
    )
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES))
    parser.add_argument("--selectors", nargs="*", default=list(SELECTORS), help="names of registered selectors")
    parser.add_argument(
        "--settings",
        type=json.loads,
        nargs="+",
        default=[{}],
        help='further AATConfig fields as JSON: {"coarse": true}',
    )
    parser.add_argument(
        "--groupings",
        type=Grouping.parse,
        nargs="*",
        default=[],
        help="key orders: TILE, TILE/CHUNK or TILE/CHUNK/AXIS keys; TOKENS must then be a multiple of the query tile",
    )
    parser.add_argument("--estimates", nargs="+", default=["mix"], choices=ESTIMATES, help="of the key orders")
    parser.add_argument(
        "--ablations",
        action="store_true",
        help=f"at the default tolerance also mix with each setting changed, and key orders up to {_WHOLE} tokens",
    )
    parser.add_argument("--all", action="store_true", help="--ablations, and without --scene every scene")
    parser.add_argument("--every", type=int, default=1, help="compare every so many positions")
    parser.add_argument("--out", type=Path, help="write a CSV with one line per pass to this file")
    _plots.add_option(parser, "KL against density")
    args = parser.parse_args(argv)
    try:
        args.scene = [
            (model, text, int(tokens)) for model, text, tokens in args.scene or (SCENES if args.all else SCENES[:1])
        ]
    except ValueError:
        parser.error(f"--scene {args.scene}: TOKENS must be a number")
    args.ablations |= args.all
    for model, text, tokens in args.scene:
        if args.groupings and tokens % AATConfig().query_tile:
            parser.error(f"--scene {model} {text} {tokens}: must be a multiple of {AATConfig().query_tile}")
    return args


def methods(args: argparse.Namespace, tokens: int) -> list[Method]:
    """All that is run over a text of so many tokens."""
    found: list[Method] = []
    for selector, changes, tolerance in product(args.selectors, args.settings, args.tolerances):
        name = f"{selector} {json.dumps(changes)}" if changes else selector
        found.append(Settings(name, tolerance, selector, changes))
    for estimate, grouping, tolerance in product(args.estimates, args.groupings, args.tolerances):
        found.append(whole(estimate, grouping, tolerance))
    if args.ablations:
        tolerance = AATConfig().tolerance
        found += ablations(tolerance)
        if tokens <= _WHOLE and tokens % AATConfig().query_tile == 0:
            found += orders(tolerance)
    return found


def run(args: argparse.Namespace, scene: Scene) -> list[FrontierResult]:
    """One result for each method."""
    name, text, tokens = scene
    model, tokenizer = load(name)
    input_ids = tokens_of(model, tokenizer, text, tokens)
    to_run = methods(args, tokens)
    results = []
    with progress(_title(scene), len(to_run) + 1) as update:
        for method in to_run:
            method.compile(model, input_ids[:, :_FEW])
        dense = run_pass(model, input_ids, "sdpa")
        update(1)
        for number, method in enumerate(to_run):
            results.append(_result(scene, method, model, input_ids, dense, args.every))
            update(number + 2)
    return results


def _result(scene: Scene, method: Method, model: Any, input_ids: Any, dense: Pass, every: int) -> FrontierResult:
    tiled = method.run(model, input_ids)
    found = quality(model, input_ids, dense.hidden, tiled.hidden, every=every)
    return FrontierResult(
        *scene, method.name, method.tolerance, tiled.density, tiled.lost, found.nll_dense, found.nll_difference,
        found.kl, found.kl_p99, found.top1_agreement, tiled.select_seconds, tiled.attention_seconds,
        dense.attention_seconds,
    )  # fmt: skip


def _title(scene: Scene) -> str:
    model, text, tokens = scene
    return f"{model}, {text}, {tokens} tokens"


def panels(results: Sequence[FrontierResult]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """(density, KL) by scene and method."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in results:
        found.setdefault(_title((r.model, r.text, r.tokens)), {}).setdefault(r.method, []).append((r.density, r.kl))
    return found


def summary(results: Sequence[FrontierResult]) -> str:
    """One line per pass."""
    head = ("method", "tolerance", "density", "lost", "ΔNLL", "KL", "KL p99", "top-1", "select s", "attention s",
            "SDPA / attention")  # fmt: skip
    return markdown_table(head, [_cells(result) for result in results])


def _cells(r: FrontierResult) -> list[str]:
    numbers = [f"{r.density:.3f}", f"{r.lost:.4f}", f"{r.nll_difference:+.4f}", f"{r.kl:.4f}", f"{r.kl_p99:.3f}"]
    times = (r.select_seconds, r.attention_seconds, r.dense_seconds / r.attention_seconds)
    shown = ["" if time != time else f"{time:.2f}" for time in times]
    return [r.method, f"{r.tolerance:g}", *numbers, f"{r.top1_agreement:.3f}", *shown]
