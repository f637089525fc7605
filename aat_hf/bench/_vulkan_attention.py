"""Tiled attention on a Vulkan device against SDPA on the CPU, and where the time of a call goes.

A call lowers the tile map, copies q, k, v to memory that the device can fetch from, uploads them, runs the shader,
downloads the output and copies it to a tensor. Each of these is timed on its own. So is the shortest submission: a call
waits for its latency once, and so do upload and download here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aat_hf.bench._common import markdown_table
from aat_hf.bench._inputs import random_map
from aat_hf.bench._timing import interleaved
from aat_hf.bench.attention import _checked
from aat_hf.kernels.vulkan import vulkan_attention
from aat_hf.tiling.masks import AttentionMask, causal_mask
from aat_hf.tiling.tile_map import EXACT, TileMap
from aat_hf.vulkan import attention, lowering, profile
from aat_hf.vulkan.attention import Call
from aat_hf.vulkan.interface import Dispatch, Provider
from aat_hf.vulkan.lowering import vectors
from aat_hf.vulkan.workspace import Workspace, pool_of

_REPEATS = 10  # dispatches of the submission that tells the time of the shader


@dataclass(frozen=True)
class AttentionResult:
    """Causal attention in float32: median seconds.

    Attributes:
        sdpa: torch on the CPU, dense; whole: `vulkan_attention` as it is called, with lowering and transfers.
        tflops: of the kernel, counting two products and two sums for each pair of the tiles it computes.
        lower: the tile map as the shader reads it; copy_in: q, k, v to host memory of the device; upload: from there.
        kernel: the shader, one of several in a submission.
        download: output and log-sum-exp to host memory of the device; copy_out: from there.
        latency: the shortest submission.
    """

    keys: int
    heads: int
    head_dim: int
    density: float
    sdpa: float
    whole: float
    tflops: float
    lower: float
    copy_in: float
    upload: float
    kernel: float
    download: float
    copy_out: float
    latency: float
    error: float


@torch.inference_mode()
def measure(provider: Provider, keys: int, density: float, args: argparse.Namespace) -> AttentionResult:
    """One row of both tables.

    Raises:
        NumericalError: the output differs from float64.
    """
    torch.manual_seed(0)
    pool_of(provider).trim()  # every case has buffers of its own size
    q, k, v = (torch.randn(1, args.heads, keys, args.head_dim) for _ in range(3))
    scale, mask = args.head_dim**-0.5, causal_mask(keys, keys, q.device)
    tile_map = random_map(q, density)
    error = _checked(vulkan_attention(q, k, v, tile_map, mask, scale)[0], q, k, v, tile_map)
    ways = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
        "whole": lambda: vulkan_attention(q, k, v, tile_map, mask, scale),
    }
    seconds = {name: timing.median for name, timing in interleaved(ways, args.rounds).items()}
    seconds |= _parts(provider, (q, k, v), tile_map, mask, args.rounds)
    pairs = int((tile_map.levels == EXACT).sum()) * tile_map.query_tile * tile_map.key_tile
    tflops = 4 * pairs * args.head_dim / seconds["kernel"] / 1e12
    mean = float(tile_map.density.mean())
    return AttentionResult(keys, args.heads, args.head_dim, mean, tflops=tflops, error=error, **seconds)


def table(results: Sequence[AttentionResult]) -> str:
    """A Markdown table of whole calls."""
    head = ["keys", "density", "SDPA CPU ms", "Vulkan with transfer ms", "kernel ms", "TFLOP/s",
            "SDPA / with transfer", "error"]  # fmt: skip
    rows = [
        [str(r.keys), f"{r.density:.3f}", *(f"{1e3 * x:.2f}" for x in (r.sdpa, r.whole, r.kernel)),
         f"{r.tflops:.2f}", f"{r.sdpa / r.whole:.2f}", f"{r.error:.0e}"]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)


def table_of_parts(results: Sequence[AttentionResult]) -> str:
    """A Markdown table of where the time goes."""
    head = ["keys", "density", "lowering ms", "copy in ms", "upload ms", "kernel ms", "download ms", "copy out ms",
            "latency ms", "whole ms"]  # fmt: skip
    rows = [
        [str(r.keys), f"{r.density:.3f}", *(f"{1e3 * x:.2f}" for x in (
            r.lower, r.copy_in, r.upload, r.kernel, r.download, r.copy_out, r.latency, r.whole))]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)


def independent(work: Workspace, dispatch: Dispatch, inputs: int, count: int) -> list[Dispatch]:
    """`dispatch` so many times, each with its own results after the first `inputs` buffers: none awaits another."""
    sizes = [buffer.used for buffer in dispatch.buffers[inputs:]]
    results = work.buffers(*sizes * (count - 1))
    parts = [tuple(results[begin : begin + len(sizes)]) for begin in range(0, len(results), len(sizes))]
    return [dispatch, *(replace(dispatch, buffers=(*dispatch.buffers[:inputs], *part)) for part in parts)]


def _parts(
    provider: Provider, inputs: tuple[Tensor, Tensor, Tensor], tile_map: TileMap, mask: AttentionMask, rounds: int
) -> dict[str, float]:
    """Median seconds of the steps of a forward call, by their names in `AttentionResult`."""
    q, k, v = inputs
    width = vectors(q.shape[3])
    shape = profile.shape(provider.device, "forward", width, width, tile_map.query_tile)
    call = Call.of(tile_map, mask, q.shape[3] ** -0.5)
    target, lse, lost = torch.empty(*q.shape[:3], v.shape[3]), torch.empty(q.shape[:3]), torch.empty(q.shape[:3])
    with Workspace(provider) as work:
        dispatch = attention.forward_dispatch(work, provider, q, k, v, call, shape)
        sent, (output, rows, word) = dispatch.buffers[:4], dispatch.buffers[4:]
        work.run(dispatch)

        def copy_in() -> None:
            for buffer, x in zip((sent[0], sent[1], sent[3]), inputs, strict=True):
                lowering.write_rows(buffer, x)

        steps: dict[str, Callable[[], Any]] = {
            "lower": lambda: lowering.by_rows(Call.of(tile_map, mask, 1.0).joined.tiles, tile_map.query_tile),
            "copy_in": copy_in,
            "upload": partial(provider.submit, [], upload=sent),
            "kernel": partial(provider.submit, independent(work, dispatch, 4, _REPEATS)),
            "download": partial(provider.submit, [], download=(output, rows)),
            "copy_out": partial(attention.read_forward, dispatch, target, lse, lost),
            "latency": partial(provider.submit, [], download=(word,)),
        }
        seconds = {name: timing.median for name, timing in interleaved(steps, rounds).items()}
    seconds["kernel"] /= _REPEATS
    return seconds
