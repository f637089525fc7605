"""`aat bench order`: would keys grouped by content, not by position, leave more to drop?

On the q, k and v of a model, whole attention matrices, head by head: for tiles of neighbours and for tiles of the
content order (`aat_hf.tiling.order`) inside closed chunks, the density that a tolerance needs, by exact masses
("oracle") and by estimates, what is lost, and the error of the output. What becomes of the model's predictions:
`aat bench selection --groupings`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from aat_hf.bench._common import MODELS, TEXTS, environment, load, look_at_layers, markdown_table, tokens_of, write_csv
from aat_hf.bench._order_trial import ESTIMATES, LEAF, Grouping, Layout, choose, density, heads_of
from aat_hf.bench._timing import interleaved
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.tiling.masks import AttentionMask
from aat_hf.tiling.order import AXES, content_order

_GROUPINGS = [Grouping(tile, chunk) for chunk in (None, 512, 1024, 2048) for tile in (16, 32, 64)]
_ERROR_STRIDE = 16  # output errors are taken over every so many rows


@dataclass(frozen=True)
class OrderResult:
    """One head with its keys grouped in one way.

    Attributes:
        chunk: keys ordered together, 0 in place; axis: of the order.
        lost: realised infidelity, mean over all rows; lost_p95: its 95th percentile over rows.
        error: norm of the error of the output over that of the output, every 16th row.
    """

    layer: int
    head: int
    key_tile: int
    chunk: int
    axis: str
    estimate: str
    tolerance: float
    density: float
    lost: float
    lost_p95: float
    error: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    args = _arguments(argv)
    model, tokenizer = load(args.model)
    input_ids = tokens_of(model, tokenizer, args.text, args.tokens)
    results: list[OrderResult] = []
    times: dict[str, float] = {}
    with progress(f"{args.model}, {args.text}, {args.tokens} tokens", model.config.num_hidden_layers) as update:

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> None:
            if layer % args.every == 0:
                results.extend(examine(layer, q, k, v, mask, scale, args.groupings, args.estimates, args.tolerances))
                times.update(times or _times(q, k, v, args.groupings, scale))
            update(layer + 1)

        look_at_layers(model, input_ids, look)
    print(f"{args.model}, {args.text}, {args.tokens} tokens; {environment()}\n")
    print(f"{summary(results)}\n\n{_times_line(times)}")
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aat bench order", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of the query tile, 64")
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05])
    parser.add_argument(
        "--groupings",
        type=Grouping.parse,
        nargs="+",
        default=_GROUPINGS,
        help=f"TILE, TILE/CHUNK or TILE/CHUNK/AXIS; AXIS: {', '.join(AXES)}",
    )
    parser.add_argument("--estimates", nargs="+", default=list(ESTIMATES), choices=ESTIMATES)
    parser.add_argument("--every", type=int, default=5, help="look at every so many layers")
    parser.add_argument("--out", type=Path, help="write a CSV with one line per head to this file")
    args = parser.parse_args(argv)
    if args.tokens % AATConfig().query_tile:
        parser.error(f"--tokens {args.tokens}: must be a multiple of {AATConfig().query_tile}")
    return args


@torch.inference_mode()
def examine(
    layer: int, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float, groupings: Sequence[Grouping],
    estimates: Sequence[str], tolerances: Sequence[float],
) -> list[OrderResult]:  # fmt: skip
    """Results of all heads of one attention call, batch 1."""
    layouts = [Layout.of(g, mask, AATConfig(tolerance=t)) for g in groupings for t in tolerances]
    sample = torch.arange(_ERROR_STRIDE // 2, q.shape[2], _ERROR_STRIDE, device=q.device)
    results = []
    for number, head in enumerate(heads_of(q, k, v, mask, scale, groupings)):
        exact_output = head.weights[sample] @ head.v[0, 0]
        for layout in layouts:
            masses = head.masses(layout)
            exact = head.estimate(layout, masses, "oracle")
            for name in estimates:
                kept = choose(layout, head.estimate(layout, masses, name), exact)
                lost = masses.masked_fill(layout.rows(kept, head.every), 0.0).sum(-1)
                error = (head.output(layout, kept, sample) - exact_output).norm() / exact_output.norm()
                numbers = (density(layout, kept), lost.mean(), lost.quantile(0.95), error)
                grouping = layout.grouping
                where = (layer, number, grouping.key_tile, grouping.chunk or 0, grouping.axis, name)
                results.append(OrderResult(*where, layout.config.tolerance, *map(float, numbers)))
    return results


def _times(q: Tensor, k: Tensor, v: Tensor, groupings: Sequence[Grouping], scale: float) -> dict[str, float]:
    """Seconds of causal SDPA and of ordering K and V by each tree."""

    def reorder(chunk: int, axis: str) -> Callable[[], Any]:
        def run() -> Any:
            order = content_order(k, chunk, LEAF, AATConfig().sink_keys, axis)[..., None]
            return k.take_along_dim(order, 2), v.take_along_dim(order, 2)

        return run

    attention = torch.nn.functional.scaled_dot_product_attention
    functions = {"sdpa": lambda: attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)}
    trees = sorted({grouping.tree for grouping in groupings if grouping.tree is not None})
    functions |= {f"in {chunk} by {axis}": reorder(chunk, axis) for chunk, axis in trees}
    return {name: timing.median for name, timing in interleaved(functions, 3).items()}


def _times_line(times: dict[str, float]) -> str:
    shares = [f"{seconds / times['sdpa']:.1%} {name}" for name, seconds in times.items() if name != "sdpa"]
    return f"Ordering K and V, of SDPA's {1e3 * times['sdpa']:.0f} ms: {', '.join(shares) or 'nothing to order'}."


def summary(results: Sequence[OrderResult]) -> str:
    """One line per tolerance, estimate and grouping, means over heads; in place comes first."""
    cases: dict[tuple[float, str, Grouping], list[OrderResult]] = {}
    for r in results:
        cases.setdefault((r.tolerance, r.estimate, Grouping(r.key_tile, r.chunk or None, r.axis)), []).append(r)
    lines = []
    for (tolerance, estimate, grouping), heads in sorted(cases.items(), key=_position):
        in_place = cases.get((tolerance, estimate, Grouping(LEAF)), heads)
        pairs = [(r.density, other.density) for r, other in zip(heads, in_place, strict=True)]
        cells = (
            fmean(r.density for r in heads),
            fmean(r.lost for r in heads) / tolerance,
            fmean(r.lost_p95 for r in heads) / tolerance,
            fmean(r.error for r in heads),
            fmean(here < there for here, there in pairs),
            fmean(map(min, pairs)),
        )
        lines.append([f"{tolerance:g} {estimate}, {grouping.name}", *(f"{cell:.3f}" for cell in cells)])
    head = ("tolerance, estimate, tiles", "density", "lost / tol.", "p95 of rows", "output error",
            f"heads below {LEAF} in place", "density, each head's better")  # fmt: skip
    return markdown_table(head, lines)


def _position(case: tuple[tuple[float, str, Grouping], Any]) -> tuple[Any, ...]:
    tolerance, estimate, grouping = case[0]
    return -tolerance, ESTIMATES.index(estimate), grouping.chunk or 0, grouping.axis, grouping.key_tile
