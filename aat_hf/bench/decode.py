"""`aat bench decode`: single queries against a long cache: SDPA, selected values, and tiles selected from summaries.

Queries are those of consecutive tokens, so that steps that are measured have their share in the mean; margins are those
that the tokens before have left. Before each step other memory is touched, as the rest of a model does. Beyond the
model's context a cache is that of consecutive pieces of the text, each run alone: its keys are real, but every piece
starts at position 0, with a sink of its own. `--growth` times what a cache costs to append a token to.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, look_at_layers, markdown_table, tokens_of, write_csv
from aat_hf.bench._timing import interleaved
from aat_hf.bench.attention import NumericalError
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.hf.cache import AATLayer
from aat_hf.kernels.dense import grouped_sdpa
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.summaries import TileSummaries

_LIMIT = 1e-5  # relative error of the output against float64 over the same tiles
_OTHER = 1 << 24  # floats touched before each step
_WARM = 68  # steps before those of a line, from which margins are learnt

Heads = tuple[Tensor, Tensor, Tensor]
"""q (1, heads, tokens, head_dim), k and v (1, kv_heads, tokens, head_dim) of one layer."""


@dataclass(frozen=True)
class DecodeResult:
    """One line: seconds per query (median, 20th and 80th percentile), and what was lost.

    Attributes:
        density: share of the tiles whose values were read; values, aat: without and with summaries.
        error: relative, of the output against float64 over the same tiles; the largest of all steps of both.
        infidelity, worst: mean and largest probability lost with summaries, of all heads and steps, by float64.
    """

    layer: int
    keys: int
    tolerance: float
    density: float
    sdpa: float
    values: float
    aat: float
    sdpa_p20: float
    values_p20: float
    aat_p20: float
    sdpa_p80: float
    values_p80: float
    aat_p80: float
    error: float
    infidelity: float
    worst: float

    @property
    def ratio(self) -> float:
        """SDPA's time over aat's, with summaries."""
        return self.sdpa / self.aat


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench decode", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="keys")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 20])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[AATConfig().tolerance])
    parser.add_argument("--queries", type=int, default=34, help="consecutive queries of a line, averaged")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--growth", action="store_true", help="time appending to a cache as well")
    parser.add_argument("--out", type=Path, help="write a CSV to this file")
    _plots.add_option(parser, "SDPA's time over aat's against length")
    args = parser.parse_args(argv)
    _plots.check(args)
    caches = _caches(args)
    results = [
        _line(args, layer, keys, tolerance, caches[layer])
        for layer in args.layers
        for keys in args.lengths
        for tolerance in args.tolerances
    ]
    print(f"{args.model}, {args.text}; {environment()}\n")
    print(summary(results))
    if args.growth:
        lines = [growth(keys, caches[args.layers[0]], args.queries, args.rounds) for keys in args.lengths]
        print("\n" + markdown_table(("keys", "DynamicCache ms", "AATCache ms", "ratio"), lines))
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    if args.plot is not None:
        points = [(f"layer {r.layer}, tolerance {r.tolerance:g}", float(r.keys), r.ratio) for r in results]
        _plots.draw(args.plot, _plots.grouped(points), "keys", "SDPA / aat", log_x=True, level=1.0)
    return 0


def _caches(args: argparse.Namespace) -> dict[int, Heads]:
    """q, k and v of the wanted layers for the longest length, a context at a time."""
    model, tokenizer = load(args.model)
    input_ids = tokens_of(model, tokenizer, args.text, max(args.lengths))
    pieces: dict[int, list[Heads]] = {layer: [] for layer in args.layers}

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> None:
        if layer in pieces:
            pieces[layer].append((q.clone(), k.clone(), v.clone()))
        if layer == max(pieces):
            raise _Enough

    parts = input_ids.split(min(model.config.max_position_embeddings, input_ids.shape[1]), 1)
    with progress(f"{args.model}, {input_ids.shape[1]} tokens", len(parts)) as update:
        for number, part in enumerate(parts):
            with suppress(_Enough):
                look_at_layers(model, part, look)
            update(number + 1)
    return {layer: _joined(parts) for layer, parts in pieces.items()}


class _Enough(Exception):
    """The wanted layers have been seen."""


def _joined(parts: Sequence[Heads]) -> Heads:
    q, k, v = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return q, k, v


@torch.no_grad()
def _line(args: argparse.Namespace, layer: int, keys: int, tolerance: float, heads: Heads) -> DecodeResult:
    queries, summaries = min(args.queries, keys), TileSummaries()
    before = [_step(heads, keys - number) for number in reversed(range(queries, min(queries + _WARM, keys)))]
    steps = [_step(heads, keys - number) for number in reversed(range(queries))]
    _selected(before, tolerance, summaries)
    found = [_selected(steps, tolerance, known, audit=True) for known in (None, summaries)]
    k, v = (x[:, :, :keys].double() for x in heads[1:])
    checked = [[_checked(*pair, k, v) for pair in zip(side, steps, strict=True)] for side in found]
    seconds = [value for part in zip(*_times(steps, tolerance, summaries, args.rounds), strict=True) for value in part]
    maps = [result.tile_map for result in found[1]]
    density = torch.stack([torch.ones(()) if tiles is None else tiles.density.mean() for tiles in maps])
    lost = torch.stack([lost for _, lost in checked[1]])
    error = max(error for side in checked for error, _ in side)
    numbers = [float(density.mean()), *seconds, error, float(lost.mean()), float(lost.max())]
    return DecodeResult(layer, keys, tolerance, *numbers)


def _step(heads: Heads, keys: int) -> Heads:
    """The query of token number `keys` and the cache up to it."""
    q, k, v = heads
    return q[:, :, keys - 1 : keys].contiguous(), k[:, :, :keys], v[:, :, :keys]


def _times(
    steps: Sequence[Heads], tolerance: float, summaries: TileSummaries, rounds: int
) -> list[tuple[float, float, float]]:  # fmt: skip
    """Seconds of a step, the mean of all: median, 20th and 80th percentile of rounds of SDPA, values, summaries."""
    other, seconds = torch.zeros(_OTHER), torch.zeros(3, rounds, dtype=torch.float64)
    functions: list[Callable[[Heads], Any]] = [
        _dense,
        lambda step: _selected([step], tolerance, None),
        lambda step: _selected([step], tolerance, summaries),
    ]
    for turn in range(rounds):
        summaries.crop(steps[0][1].shape[2])  # those of the tiles that grow meanwhile are made anew
        for step in steps:
            for number, function in enumerate(functions):
                other.add_(1.0)
                start = time.perf_counter()
                function(step)
                seconds[number, turn] += (time.perf_counter() - start) / len(steps)
    found = torch.stack([seconds.quantile(part, 1) for part in (0.5, 0.2, 0.8)], 1)
    return [(middle, low, high) for middle, low, high in found.tolist()]


def _dense(step: Heads) -> None:
    q, k, v = step
    grouped_sdpa(q, k, v, None, q.shape[3] ** -0.5, 0.0)


def _selected(
    steps: Sequence[Heads], tolerance: float, summaries: TileSummaries | None, audit: bool = False
) -> list[TiledAttentionResult]:
    """The steps, with the `summaries` that a cache would keep."""
    config, results = _config(tolerance), []
    for q, k, v in steps:
        if summaries is not None:
            summaries.note(k)
        results.append(tiled_attention(q, k, v, config=config, is_causal=True, need_lse=False, audit=audit))
    return results


@lru_cache
def _config(tolerance: float) -> AATConfig:
    return AATConfig(tolerance=tolerance, backend="cpu", decode_from=0, dense_prefix=0)


def _checked(result: TiledAttentionResult, step: Heads, k: Tensor, v: Tensor) -> tuple[float, Tensor]:
    """Relative error of the output against float64 over the same tiles, and the infidelity (heads,) by float64.

    Args:
        k, v: those of `step` and more after them, (1, kv_heads, keys, head_dim) float64.

    Raises:
        NumericalError: the error is too large, or the infidelity is not the one reported.
    """
    q, keys = step[0].double(), step[1].shape[2]
    seen = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    kept = seen
    if result.tile_map is not None:
        kept = result.tile_map.exact.repeat_interleave(result.tile_map.key_tile, -1)[..., :keys]
    k, v, scale = k[:, :, :keys], v[:, :, :keys], q.shape[3] ** -0.5
    wanted, lse, _ = reference_attention(q, k, v, kept, scale)
    _, exact, _ = reference_attention(q, k, v[..., :1], seen, scale)
    error = float((result.output - wanted).norm() / wanted.norm())
    lost = -torch.expm1(lse - exact)
    told = result.audit is None or torch.allclose(lost, result.audit.infidelity, atol=_LIMIT)
    if not (error < _LIMIT and told):
        raise NumericalError(f"relative error {error:.1e} with {keys} keys: no time is reported")
    return error, lost.flatten()


@torch.no_grad()
def growth(keys: int, heads: Heads, queries: int, rounds: int) -> list[str]:
    """Milliseconds to append one token to a layer's cache of `keys` tokens: a line of the table.

    Raises:
        NumericalError: the caches do not hold the same.
    """
    layers = {"dynamic": DynamicLayer(), "aat": AATLayer()}

    def append(layer: DynamicLayer) -> Tensor:
        for number in range(queries):
            held, _ = layer.update(*(x[:, :, number : number + 1] for x in heads[1:]))
        return held

    for layer in layers.values():
        layer.update(*(x[:, :, :keys] for x in heads[1:]))
    times = interleaved({name: partial(append, layer) for name, layer in layers.items()}, rounds)
    if not torch.equal(*map(append, layers.values())):
        raise NumericalError(f"caches of {keys} keys do not hold the same: no time is reported")
    dynamic, aat = (1e3 * times[name].divided(queries).median for name in layers)
    return [str(keys), f"{dynamic:.2f}", f"{aat:.2f}", f"{dynamic / aat:.0f}"]


def summary(results: Sequence[DecodeResult]) -> str:
    """A Markdown table."""
    head = (
        "layer", "keys", "tolerance", "density", "SDPA ms", "values ms", "summaries ms (p20–p80)", "SDPA / values",
        "SDPA / summaries", "error", "lost", "most",
    )  # fmt: skip
    rows = [
        [
            str(r.layer), str(r.keys), f"{r.tolerance:g}", f"{r.density:.3f}", f"{1e3 * r.sdpa:.2f}",
            f"{1e3 * r.values:.2f}", f"{1e3 * r.aat:.2f} ({1e3 * r.aat_p20:.2f}–{1e3 * r.aat_p80:.2f})",
            f"{r.sdpa / r.values:.2f}", f"{r.ratio:.2f}", f"{r.error:.0e}", f"{r.infidelity:.4f}", f"{r.worst:.4f}",
        ]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)
