"""`aat bench heads`: what the tile selectors promise and what they keep, on the q and k of real models.

Every layer of a model is run over a text; for each selector and tolerance the map that `tiled_attention` would use
is made, and compared with the exact tile masses of *all* rows: realised infidelity, density, and whether the audit's
interval covers the truth. The oracle selects from the exact masses themselves. With --certificates: how many culls are
certain from the keys' balls and boxes alone.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, look_at_layers, markdown_table, tokens_of, write_csv
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.tiling.audit import Audit
from aat_hf.tiling.certificate import TileBounds, certified, certified_query_tiles, tile_bounds
from aat_hf.tiling.layout import forced_tiles, held_out_rows
from aat_hf.tiling.masks import NONE, AttentionMask
from aat_hf.tiling.measure import RowMasses, mean_over_query_tiles, measure_rows
from aat_hf.tiling.repair import select_and_repair
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import SELECTORS, get_selector

TOLERANCES = (0.1, 0.05, 0.02, 0.01)


@dataclass(frozen=True)
class HeadResult:
    """One head under one selector and tolerance.

    Attributes:
        lost: realised infidelity, mean over all rows; lost_p95: its 95th percentile over rows.
        audited, half_width: what the audit of held-out rows says of `lost`.
        ball, box, either: share of the culled tiles that a bound certifies; rows_certified: share of the query tiles
            whose culls are certified together. NaN where not asked for, or where nothing was culled.
    """

    model: str
    text: str
    tokens: int
    layer: int
    head: int
    selector: str
    tolerance: float
    density: float
    lost: float
    lost_p95: float
    audited: float
    half_width: float
    ball: float = math.nan
    box: float = math.nan
    either: float = math.nan
    rows_certified: float = math.nan

    @property
    def covered(self) -> bool:
        """Whether the audit's 95 % interval holds the truth (to float32 accuracy)."""
        return abs(self.audited - self.lost) <= self.half_width + 1e-6


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    args = _arguments(argv)
    model, tokenizer = load(args.model)
    input_ids = tokens_of(model, tokenizer, args.text, args.tokens)
    results: list[HeadResult] = []
    with progress(f"{args.model}, {args.text}, {args.tokens} tokens", model.config.num_hidden_layers) as update:

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> None:
            if layer % args.every == 0:
                how = (args.selectors, args.tolerances, args.certificates)
                for selector, tolerance, found in examine(q, k, mask, scale, *how):
                    results.extend(_by_head(args, layer, selector, tolerance, found))
            update(layer + 1)

        look_at_layers(model, input_ids, look)
    print(f"{args.model}, {args.text}, {args.tokens} tokens; {environment()}\n")
    print(summary(results))
    if args.certificates:
        print(f"\n{certificates(results)}")
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    if args.plot is not None:
        _plots.draw(args.plot, _frontier(results), "density", "realised infidelity", log_y=True)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="aat bench heads", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--tolerances", type=float, nargs="+", default=list(TOLERANCES))
    parser.add_argument("--selectors", nargs="+", default=sorted(SELECTORS), help="names of registered selectors")
    parser.add_argument("--every", type=int, default=1, help="look at every so many layers")
    parser.add_argument(
        "--certificates",
        action="store_true",
        help="the share of culls that bounds certify (a fifth of the scores' cost, in float64)",
    )
    parser.add_argument("--out", type=Path, help="write a CSV with one line per head to this file")
    _plots.add_option(parser, "realised infidelity against density")
    args = parser.parse_args(argv)
    _plots.check(args)
    if "oracle" not in args.selectors:
        args.selectors.append("oracle")
    return args


def _frontier(results: Sequence[HeadResult]) -> dict[str, list[tuple[float, float]]]:
    """(density, realised infidelity), means over heads, of each selector at every tolerance."""
    cases: dict[tuple[str, float], list[HeadResult]] = {}
    for result in results:
        cases.setdefault((result.selector, result.tolerance), []).append(result)
    points = [
        (name, fmean(r.density for r in heads), fmean(r.lost for r in heads)) for (name, _), heads in cases.items()
    ]
    return _plots.grouped(points)


@torch.inference_mode()
def examine(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    scale: float,
    selectors: Sequence[str],
    tolerances: Sequence[float],
    with_certificates: bool = False,
) -> list[tuple[str, float, dict[str, Tensor]]]:
    """(selector, tolerance, per-head tensors (heads,) named as in `HeadResult`) of one attention call, batch 1."""
    config = AATConfig()
    rows = torch.arange(q.shape[2], device=q.device)
    exact = measure_rows(q, k, mask, rows, config.key_tile, scale)
    states = mask.tile_states(config.query_tile, config.key_tile)
    bounds = tile_bounds(q, k, exact.lse, config.query_tile, config.key_tile, scale) if with_certificates else None
    found = []
    for selector in selectors:
        for tolerance in tolerances:
            scene = Scene(q, k, mask, states, scale, config.replace(tolerance=tolerance))
            if selector == "oracle":
                scene.config = scene.config.replace(control_rows=0)
                mass = mean_over_query_tiles(_pad_rows(exact, config.query_tile), states.shape[2])
            else:
                mass = get_selector(selector)(scene)
            kept = select_and_repair(scene, mass, forced_tiles(mask, states, scene.config))
            judged = _judge(scene, kept, exact.probability)
            if bounds is not None:
                judged |= _certified(bounds, (states != NONE) & ~kept, tolerance)
            found.append((selector, tolerance, judged))
    return found


def _pad_rows(exact: RowMasses, query_tile: int) -> RowMasses:
    """Fill up the last query tile: rows past the end see no key and count for nothing."""
    missing = -exact.lse.shape[2] % query_tile
    pad = torch.nn.functional.pad
    return RowMasses(pad(exact.probability, (0, 0, 0, missing)), pad(exact.lse, (0, missing), value=float("-inf")))


def _judge(scene: Scene, kept: Tensor, exact: Tensor) -> dict[str, Tensor]:
    row_kept = kept.repeat_interleave(scene.config.query_tile, 2)[:, :, : exact.shape[2]]
    lost = exact.masked_fill(row_kept, 0.0).sum(-1)  # [1, H, N]
    audited = held_out_rows(scene.q.shape[2], scene.config, scene.q.device)
    audit = Audit(audited, lost[:, :, audited])
    visible = (scene.states != 0).sum((-1, -2))
    return {
        "density": (kept.sum((-1, -2)) / visible)[0],
        "lost": lost.mean(-1)[0],
        "lost_p95": lost.quantile(0.95, -1)[0],
        "audited": audit.mean[0],
        "half_width": audit.half_width[0],
    }


def _certified(bounds: TileBounds, culled: Tensor, tolerance: float) -> dict[str, Tensor]:
    shares = {name: certified(bound, culled, tolerance)[0] for name, bound in bounds._asdict().items()}
    return shares | {"rows_certified": certified_query_tiles(bounds.either, culled, tolerance)[0]}


def _by_head(
    args: argparse.Namespace, layer: int, selector: str, tolerance: float, found: dict[str, Tensor]
) -> list[HeadResult]:
    names, columns = list(found), [values.tolist() for values in found.values()]
    where = (args.model, args.text, args.tokens, layer)
    return [
        HeadResult(*where, head, selector, tolerance, **dict(zip(names, values, strict=True)))
        for head, values in enumerate(zip(*columns, strict=True))
    ]


def summary(results: Sequence[HeadResult]) -> str:
    """One line per tolerance and selector, averaged over heads."""
    lines = []
    for tolerance in sorted({r.tolerance for r in results}, reverse=True):
        here = [r for r in results if r.tolerance == tolerance]
        best = _mean([r.density for r in here if r.selector == "oracle"])
        for selector in sorted({r.selector for r in here}):
            heads = [r for r in here if r.selector == selector]
            density, lost = _mean([r.density for r in heads]), [r.lost / tolerance for r in heads]
            cells = (
                density,
                density / best,
                _mean(lost),
                sorted(lost)[int(0.9 * (len(lost) - 1))],
                _mean([float(value <= 1.5) for value in lost]),
                _mean([r.lost_p95 / tolerance for r in heads]),
                _mean([float(r.covered) for r in heads]),
            )
            lines.append([f"{tolerance:g} {selector}", *(f"{cell:.3f}" for cell in cells)])
    head = ("tolerance, selector", "density", "/ oracle", "lost / tol.", "p90 of heads", "heads ≤ 1.5", "p95 of rows",
            "interval covers")  # fmt: skip
    return markdown_table(head, lines)


def certificates(results: Sequence[HeadResult]) -> str:
    """One line per tolerance and selector: shares of culls certified, means over the heads that cull."""
    cases: dict[tuple[float, str], list[HeadResult]] = {}
    for r in results:
        if not math.isnan(r.either):
            cases.setdefault((-r.tolerance, r.selector), []).append(r)
    lines = []
    for (tolerance, selector), heads in sorted(cases.items()):
        shares = ([r.ball for r in heads], [r.box for r in heads], [r.either for r in heads])
        cells = [*map(_mean, shares), _mean([r.rows_certified for r in heads])]
        lines.append([f"{-tolerance:g} {selector}", *(f"{cell:.3f}" for cell in cells)])
    head = ("tolerance, selector", "culls certified by the ball", "by the box", "by either", "query tiles, all culls")
    return markdown_table(head, lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
