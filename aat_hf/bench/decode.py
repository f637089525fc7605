"""`aat bench decode`: one query against a long cache, SDPA against the selection of values, on a model's q, k and v.

Beyond the model's context a cache is that of consecutive pieces of the text, each run alone: its keys are real, but
every piece starts at position 0, with a sink of its own. The queries are those of the last tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, TEXTS, environment, load, look_at_layers, markdown_table, tokens_of, write_csv
from aat_hf.bench._timing import interleaved
from aat_hf.bench.attention import NumericalError
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.kernels.dense import grouped_sdpa
from aat_hf.kernels.reference import reference_attention

_LIMIT = 1e-5  # relative error of the output against float64 over the same tiles
_SPACING = 16  # tokens between the queries of a line

Heads = tuple[Tensor, Tensor, Tensor]
"""q (1, heads, tokens, head_dim), k and v (1, kv_heads, tokens, head_dim) of one layer."""


@dataclass(frozen=True)
class DecodeResult:
    """One line: seconds per query (median, 20th, 80th percentile) of SDPA and of aat, and what was lost."""

    layer: int
    keys: int
    tolerance: float
    density: float
    sdpa: float
    sdpa_p20: float
    sdpa_p80: float
    aat: float
    aat_p20: float
    aat_p80: float
    error: float
    infidelity: float
    worst: float

    @property
    def ratio(self) -> float:
        """SDPA's time over aat's."""
        return self.sdpa / self.aat


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench decode", description=__doc__)
    parser.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)}, a folder or a name on the Hub")
    parser.add_argument("--text", default="code", help=f"{', '.join(TEXTS)} or a UTF-8 file")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536], help="keys")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 20])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[AATConfig().tolerance])
    parser.add_argument("--queries", type=int, default=8, help="queries of a line, averaged")
    parser.add_argument("--rounds", type=int, default=9)
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

    parts = input_ids.split(min(model.config.max_position_embeddings, input_ids.shape[1]), 1)
    with progress(f"{args.model}, {input_ids.shape[1]} tokens", len(parts)) as update:
        for number, part in enumerate(parts):
            look_at_layers(model, part, look)
            update(number + 1)
    return {layer: _joined(parts) for layer, parts in pieces.items()}


def _joined(parts: Sequence[Heads]) -> Heads:
    q, k, v = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return q, k, v


@torch.inference_mode()
def _line(args: argparse.Namespace, layer: int, keys: int, tolerance: float, heads: Heads) -> DecodeResult:
    config = AATConfig(tolerance=tolerance, backend="cpu", decode_from=0, dense_prefix=0)
    steps = [_step(heads, keys - _SPACING * number) for number in range(args.queries) if keys > _SPACING * number]

    def sdpa() -> None:
        for q, k, v in steps:
            grouped_sdpa(q, k, v, None, q.shape[3] ** -0.5, 0.0)

    def aat(audit: bool = False) -> list[TiledAttentionResult]:
        return [
            tiled_attention(q, k, v, config=config, is_causal=True, need_lse=False, audit=audit) for q, k, v in steps
        ]

    results = aat(audit=True)
    checked = [_checked(result, *step) for result, step in zip(results, steps, strict=True)]
    times = interleaved({"sdpa": sdpa, "aat": partial(aat)}, args.rounds)
    density = torch.stack([result.tile_map.density for result in results if result.tile_map is not None])
    lost = torch.stack([lost for _, lost in checked])
    sdpa_time, aat_time = (times[name].divided(len(steps)) for name in ("sdpa", "aat"))
    error = max(error for error, _ in checked)
    return DecodeResult(
        layer, keys, tolerance, float(density.mean()), sdpa_time.median, sdpa_time.p20, sdpa_time.p80,
        aat_time.median, aat_time.p20, aat_time.p80, error, float(lost.mean()), float(lost.max()),
    )  # fmt: skip


def _step(heads: Heads, keys: int) -> Heads:
    """The query of token number `keys` and the cache up to it."""
    q, k, v = heads
    return q[:, :, keys - 1 : keys].contiguous(), k[:, :, :keys], v[:, :, :keys]


def _checked(result: TiledAttentionResult, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, Tensor]:
    """Relative error of the output against float64 over the same tiles, and the infidelity (heads,) by float64.

    Raises:
        NumericalError: the error is too large, or the infidelity is not the one reported.
    """
    assert result.tile_map is not None and result.audit is not None  # nothing in the settings asks for exact attention
    seen = torch.ones(1, 1, 1, k.shape[2], dtype=torch.bool)
    kept = result.tile_map.exact.repeat_interleave(result.tile_map.key_tile, -1)[..., : k.shape[2]]
    wide = q.double(), k.double(), v.double()
    wanted, lse, _ = reference_attention(*wide, kept, q.shape[3] ** -0.5)
    _, exact, _ = reference_attention(*wide, seen, q.shape[3] ** -0.5)
    error = float((result.output - wanted).norm() / wanted.norm())
    lost = -torch.expm1(lse - exact)
    if not (error < _LIMIT and torch.allclose(lost, result.audit.infidelity, atol=_LIMIT)):
        raise NumericalError(f"relative error {error:.1e} with {k.shape[2]} keys: no time is reported")
    return error, lost.flatten()


def summary(results: Sequence[DecodeResult]) -> str:
    """A Markdown table."""
    head = (
        "layer",
        "keys",
        "tolerance",
        "density",
        "SDPA ms",
        "aat ms (p20–p80)",
        "SDPA / aat",
        "error",
        "lost",
        "most",
    )
    rows = [
        [
            str(r.layer), str(r.keys), f"{r.tolerance:g}", f"{r.density:.3f}", f"{1e3 * r.sdpa:.2f}",
            f"{1e3 * r.aat:.2f} ({1e3 * r.aat_p20:.2f}–{1e3 * r.aat_p80:.2f})", f"{r.ratio:.2f}", f"{r.error:.0e}",
            f"{r.infidelity:.4f}", f"{r.worst:.4f}",
        ]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)
