"""`aat bench attention`: the kernel and the whole of tiled attention against SDPA, interleaved in one process.

Kernel: random tile maps of given densities (first and diagonal tile always kept), forward and forward + backward.
Whole (`--model`): selection, kernel and audit on the real q, k, v of some layers of a model. No ratio is printed
unless the output agrees with float64 attention over the same tiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aat_hf.attention import tiled_attention
from aat_hf.bench import _plots
from aat_hf.bench._common import MODELS, environment, load, look_at_layers, markdown_table, tokens_of, write_csv
from aat_hf.bench._inputs import random_map
from aat_hf.bench._selection_profile import selection_steps
from aat_hf.bench._timing import Timing, interleaved
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice, progress
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.gather import gather_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.report import stages
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.select import Scene
from aat_hf.tiling.tile_map import TileMap

_KERNELS = {"cpu": cpu_attention, "gather": gather_attention}
_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # relative error of the output


class NumericalError(RuntimeError):
    """A kernel's result disagrees with float64 attention; there is no point in its speed."""


@dataclass(frozen=True)
class AttentionResult:
    """One line: seconds (median, 20th, 80th percentile) of SDPA and of aat, and their ratio."""

    what: str
    keys: int
    heads: int
    head_dim: int
    dtype: str
    density: float
    sdpa: float
    sdpa_p20: float
    sdpa_p80: float
    aat: float
    aat_p20: float
    aat_p80: float
    error: float
    infidelity: float | None
    stages: str

    @property
    def ratio(self) -> float:
        """SDPA's time over aat's."""
        return self.sdpa / self.aat


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench attention", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, help="that the heads share (one each)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument(
        "--backend",
        choices=[*sorted(_KERNELS), "auto"],
        default="cpu",
        help="auto: as in use, exact where that is faster",
    )
    parser.add_argument("--backward", action="store_true", help="also time forward + backward")
    parser.add_argument("--model", help=f"the whole on real q, k, v: {', '.join(MODELS)}, a folder or a Hub name")
    parser.add_argument("--text", default="code")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 12, 20])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[0.05, 0.02])
    parser.add_argument(
        "--profile", action="store_true", help="milliseconds of the whole by stage, and of the steps of selection"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write a CSV to this file")
    _plots.add_option(parser, "time against density, or of the whole against length")
    args = parser.parse_args(argv)
    args.kv_heads = args.kv_heads or args.heads
    if args.heads % args.kv_heads:
        parser.error(f"--heads {args.heads}: must be a multiple of --kv-heads {args.kv_heads}")
    if args.backend == "auto" and args.model is None:
        parser.error("--backend auto chooses for the calls of a --model")
    _plots.check(args)
    results = whole(args) if args.model else kernels(args)
    print(f"{environment()}\n")
    print(summary(results, args.profile))
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    if args.plot is not None and args.model:
        points = [(r.what, float(r.keys), r.ratio) for r in results]
        _plots.draw(args.plot, _plots.grouped(points), "keys", "SDPA / aat", log_x=True, level=1.0)
    elif args.plot is not None:
        points = [(f"{r.what}, {r.keys} keys", r.density, 1 / r.ratio) for r in results]
        _plots.draw(args.plot, _plots.grouped(points), "density", "aat / SDPA", level=1.0)
    return 0


def kernels(args: argparse.Namespace) -> list[AttentionResult]:
    """The kernel alone, one line per length, density and direction."""
    dtype = getattr(torch, args.dtype)
    results = []
    for keys in args.lengths:
        torch.manual_seed(0)
        shape = (1, args.heads, keys, args.head_dim), (1, args.kv_heads, keys, args.head_dim)
        q, k, v = (torch.randn(s, dtype=dtype, device=args.device) for s in (shape[0], shape[1], shape[1]))
        for density in args.densities:
            tile_map = random_map(q, density)
            results.append(_forward(args, q, k, v, tile_map))
            if args.backward:
                results.append(_backward(args, q, k, v, tile_map))
    return results


def _forward(args: argparse.Namespace, q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> AttentionResult:
    mask, kernel = causal_mask(q.shape[2], q.shape[2], q.device), _KERNELS[args.backend]
    scale = q.shape[3] ** -0.5
    with torch.no_grad():
        error = _checked(kernel(q, k, v, tile_map, mask, scale)[0], q, k, v, tile_map)
        times = interleaved(
            {"sdpa": lambda: _sdpa(q, k, v), "aat": lambda: kernel(q, k, v, tile_map, mask, scale)}, args.rounds
        )
    return _line("kernel forward", q, tile_map, times, error)


def _backward(args: argparse.Namespace, q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> AttentionResult:
    mask, kernel = causal_mask(q.shape[2], q.shape[2], q.device), _KERNELS[args.backend]
    scale = q.shape[3] ** -0.5
    leaves = q, k, v = tuple(x.clone().requires_grad_() for x in (q, k, v))
    gradient = torch.randn_like(q)
    dense, tiled = _sdpa(q, k, v), kernel(q, k, v, tile_map, mask, scale)[0]
    error = _checked_gradients(leaves, tiled, gather_attention(q, k, v, tile_map, mask, scale)[0], gradient)
    times = interleaved(
        {
            "sdpa": lambda: torch.autograd.grad(dense, leaves, gradient, retain_graph=True),
            "aat": lambda: torch.autograd.grad(tiled, leaves, gradient, retain_graph=True),
        },
        args.rounds,
    )
    return _line("kernel backward", q, tile_map, times, error)


def whole(args: argparse.Namespace) -> list[AttentionResult]:
    """All of `tiled_attention`, audit included, on q, k and v of a model's layers."""
    model, tokenizer = load(args.model)
    results: list[AttentionResult] = []
    for keys in args.lengths:
        input_ids = tokens_of(model, tokenizer, args.text, keys)
        kept: list[tuple[int, Tensor, Tensor, Tensor]] = []

        def look(layer: int, q: Tensor, k: Tensor, v: Tensor, *_: Any, kept: list[Any] = kept) -> None:
            if layer in args.layers:
                kept.append((layer, *(x.to(args.device, copy=True) for x in (q, k, v))))

        with progress(f"{args.model}, {keys} tokens", 0):
            look_at_layers(model, input_ids, look)
        for layer, q, k, v in kept:
            results += [_whole_line(args, layer, tolerance, q, k, v) for tolerance in args.tolerances]
    return results


@torch.inference_mode()
def _whole_line(
    args: argparse.Namespace, layer: int, tolerance: float, q: Tensor, k: Tensor, v: Tensor
) -> AttentionResult:
    shortest = None if args.backend == "auto" else 0  # 0: tiled at any length and density
    config = AATConfig(tolerance=tolerance, backend=args.backend, min_length=shortest)

    mask = causal_mask(q.shape[2], k.shape[2], q.device)  # once, as the layers of a model share it

    def run() -> Any:
        return tiled_attention(q, k, v, config=config, attn_mask=mask, need_lse=False)

    run()  # compiles
    before, stages.timing = stages.timing, True
    try:
        result = run()
    finally:
        stages.timing = before
    times = interleaved({"sdpa": lambda: _sdpa(q, k, v), "aat": run}, args.rounds)
    what = f"layer {layer}, tolerance {tolerance:g}"
    milliseconds = dict(result.stages)
    if args.profile and result.tile_map is not None:
        scene = Scene.of(q.contiguous(), k.contiguous(), mask, q.shape[3] ** -0.5, config)
        milliseconds |= selection_steps(scene, args.rounds)
    parts = ", ".join(f"{name} {value:.1f}" for name, value in milliseconds.items())
    if result.tile_map is None:
        return _line(f"{what}: {result.reason}", q, None, times, 0.0, None, parts)
    error = _checked(result.output, q, k, v, result.tile_map)
    return _line(what, q, result.tile_map, times, error, float(result.audit.mean.mean()), parts)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _checked(output: Tensor, q: Tensor, k: Tensor, v: Tensor, tile_map: TileMap) -> float:
    """Relative error against float64 attention over the same tiles, on some query tiles.

    Raises:
        NumericalError: it is too large.
    """
    tiles = torch.linspace(0, tile_map.shape[2] - 1, min(8, tile_map.shape[2])).long().unique().tolist()
    exact = tile_map.exact
    wrong = right = 0.0
    for tile in tiles:
        rows = torch.arange(tile * tile_map.query_tile, min((tile + 1) * tile_map.query_tile, q.shape[2]))
        seen = rows[:, None].to(q.device) >= torch.arange(k.shape[2], device=q.device)
        allowed = exact[:, :, tile].repeat_interleave(tile_map.key_tile, -1)[:, :, None, : k.shape[2]] & seen
        wanted, _, _ = reference_attention(q[:, :, rows].double(), k.double(), v.double(), allowed, q.shape[3] ** -0.5)
        wrong += float((output[:, :, rows] - wanted).square().sum())
        right += float(wanted.square().sum())
    error = (wrong / right) ** 0.5
    if not error < _LIMIT[q.dtype]:
        raise NumericalError(f"relative error {error:.1e} at {tuple(q.shape)}, {q.dtype}: no time is reported")
    return error


def _checked_gradients(leaves: tuple[Tensor, ...], tiled: Tensor, other: Tensor, gradient: Tensor) -> float:
    """Largest relative difference of the gradients from those of the gather kernel.

    Raises:
        NumericalError: it is too large.
    """
    pairs = zip(*(torch.autograd.grad(x, leaves, gradient, retain_graph=True) for x in (tiled, other)), strict=True)
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    if not error < 10 * _LIMIT[tiled.dtype]:
        raise NumericalError(f"gradients differ by {error:.1e}: no time is reported")
    return error


def _line(
    what: str,
    q: Tensor,
    tile_map: TileMap | None,
    times: dict[str, Timing],
    error: float,
    infidelity: float | None = None,
    parts: str = "",
) -> AttentionResult:
    sdpa, aat = times["sdpa"], times["aat"]
    density = 1.0 if tile_map is None else float(tile_map.density.mean())
    return AttentionResult(
        what, q.shape[2], q.shape[1], q.shape[3], str(q.dtype).removeprefix("torch."), density,
        sdpa.median, sdpa.p20, sdpa.p80, aat.median, aat.p20, aat.p80, error, infidelity, parts,
    )  # fmt: skip


def summary(results: Sequence[AttentionResult], profile: bool = False) -> str:
    """A Markdown table."""
    head = ["what", "keys", "density", "SDPA ms", "aat ms (p20–p80)", "SDPA / aat", "aat / (density × SDPA)", "error",
            "lost (audited)"]  # fmt: skip
    rows = [
        [
            r.what, str(r.keys), f"{r.density:.3f}", f"{1e3 * r.sdpa:.1f}",
            f"{1e3 * r.aat:.1f} ({1e3 * r.aat_p20:.1f}–{1e3 * r.aat_p80:.1f})", f"{r.ratio:.2f}",
            f"{r.aat / r.sdpa / r.density:.2f}", f"{r.error:.0e}",
            "" if r.infidelity is None else f"{r.infidelity:.4f}",
            *([r.stages] if profile else []),
        ]
        for r in results
    ]  # fmt: skip
    return markdown_table([*head, *(["stages, ms"] if profile else [])], rows)
