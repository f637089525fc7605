"""`aat bench vulkan`: a Vulkan device against torch on the CPU, with and without the transfers.

Plain operations on square matrices: alone, with the copies to and from the device, and many in one submission. Tiled
attention: dense and sparse causal maps against SDPA. Nothing is timed whose numbers disagree with torch's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from aat_hf.bench._common import environment, markdown_table, write_csv
from aat_hf.bench._inputs import random_map
from aat_hf.bench._timing import interleaved
from aat_hf.bench.attention import NumericalError, _checked
from aat_hf.data.progress import notice
from aat_hf.kernels.cpu import lower_tiles
from aat_hf.kernels.vulkan import vulkan_attention
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import EXACT
from aat_hf.vulkan import attention, ops, profile
from aat_hf.vulkan.attention import Call
from aat_hf.vulkan.interface import Dispatch, Provider
from aat_hf.vulkan.lowering import TileList, vectors
from aat_hf.vulkan.provider import get_provider
from aat_hf.vulkan.workspace import Workspace

_LIMIT = 2e-6  # largest error of a plain operation relative to its largest result
_TORCH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add, "mul": torch.mul, "relu": lambda a, _: a.relu(), "matmul": torch.matmul,
}  # fmt: skip


@dataclass(frozen=True)
class OperationResult:
    """One plain operation on (size, size) matrices: median seconds a call.

    Attributes:
        torch: torch on the CPU; moved: on the device, copies there and back included.
        single: on the device, one submission of one dispatch; batched: one of many in a submission.
    """

    operation: str
    size: int
    torch: float
    moved: float
    single: float
    batched: float
    error: float


@dataclass(frozen=True)
class AttentionResult:
    """Causal attention in float32: median seconds a call.

    Attributes:
        sdpa: torch on the CPU, dense; whole: `vulkan_attention` as it is called, with lowering and transfers.
        kernel: the shader alone, one of several in a submission.
        tflops: of the kernel, counting two products and two sums for each pair of the tiles it computes.
    """

    keys: int
    heads: int
    head_dim: int
    density: float
    sdpa: float
    whole: float
    kernel: float
    tflops: float
    error: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench vulkan", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048], help="of the matrices")
    parser.add_argument("--operations", nargs="+", choices=list(_TORCH), default=list(_TORCH))
    parser.add_argument("--batch", type=int, default=20, help="operations of a batched submission")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--provider", choices=["kompute", "vulkan"], help="binding; default: as elsewhere")
    parser.add_argument("--out", type=Path, help="write the attention table as CSV to this file")
    args = parser.parse_args(argv)
    provider = get_provider(args.provider)
    print(f"{environment()}\n{provider.device.name} through {provider.name}\n")
    operations = [_operation(provider, name, size, args) for name in args.operations for size in args.sizes]
    if operations:
        print(f"{_operation_table(operations, args.batch)}\n")
    lines = [_attention(provider, keys, density, args) for keys in args.lengths for density in args.densities]
    if lines:
        print(_attention_table(lines))
    if lines and args.out is not None:
        write_csv(args.out, lines)
        notice(f"Wrote {args.out}")
    return 0


def _operation(provider: Provider, name: str, size: int, args: argparse.Namespace) -> OperationResult:
    torch.manual_seed(0)
    a, b = torch.randn(size, size), torch.randn(size, size)

    def moved() -> Tensor:
        if name == "matmul":
            return ops.matmul(provider, a[None], b[None])[0]
        return ops.elementwise(provider, name, a, None if name == "relu" else b)

    expected = _TORCH[name](a.double(), b.double())
    error = float((moved() - expected).abs().max() / expected.abs().max())
    if not error < _LIMIT:
        raise NumericalError(f"{name} of size {size} has relative error {error:.1e}: no time is reported")
    with Workspace(provider) as work:
        buffers = work.rows(a), work.rows(b), work.result((size, size))
        if name == "matmul":
            dispatch = ops.matmul_dispatch(provider, *buffers, (1, size, size, size))
        else:
            dispatch = ops.elementwise_dispatch(provider, name, *buffers, size * size)
        work.run(dispatch)
        times = interleaved(
            {
                "torch": partial(_TORCH[name], a, b),
                "moved": moved,
                "single": partial(provider.submit, [dispatch]),
                "batched": partial(provider.submit, [dispatch] * args.batch),
            },
            args.rounds,
        )
    seconds = {key: timing.median for key, timing in times.items()}
    seconds["batched"] /= args.batch
    return OperationResult(name, size, **seconds, error=error)


@torch.inference_mode()
def _attention(provider: Provider, keys: int, density: float, args: argparse.Namespace) -> AttentionResult:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, args.heads, keys, args.head_dim) for _ in range(3))
    scale, mask = args.head_dim**-0.5, causal_mask(keys, keys, q.device)
    tile_map = random_map(q, density)
    error = _checked(vulkan_attention(q, k, v, tile_map, mask, scale)[0], q, k, v, tile_map)
    times = interleaved(
        {
            "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True),
            "whole": lambda: vulkan_attention(q, k, v, tile_map, mask, scale),
        },
        args.rounds,
    )
    tiles = TileList(*lower_tiles(tile_map, mask))
    call = Call(tiles, tile_map.shape, tile_map.query_tile, tile_map.key_tile, scale)
    kernel = _kernel_seconds(provider, (q, k, v), call, args.rounds)
    pairs = int((tile_map.levels == EXACT).sum()) * tile_map.query_tile * tile_map.key_tile
    return AttentionResult(
        keys, args.heads, args.head_dim, float(tile_map.density.mean()), times["sdpa"].median, times["whole"].median,
        kernel, 4 * pairs * args.head_dim / kernel / 1e12, error,
    )  # fmt: skip


def _kernel_seconds(provider: Provider, inputs: tuple[Tensor, Tensor, Tensor], call: Call, rounds: int) -> float:
    """The forward shader on what lies on the device."""
    width, repeats = vectors(inputs[0].shape[3]), 5
    shape = profile.shape(provider.device, "forward", width, vectors(inputs[2].shape[3]), call.query_tile)
    with Workspace(provider) as work:
        dispatch: Dispatch = attention.forward_dispatch(work, provider, *inputs, call, shape)
        work.run(dispatch)
        timing = interleaved({"kernel": partial(provider.submit, [dispatch] * repeats)}, rounds)
    return timing["kernel"].median / repeats


def _operation_table(results: Sequence[OperationResult], batch: int) -> str:
    head = ["operation", "size", "torch CPU ms", "with transfer ms", "single ms", f"one of {batch} ms",
            "torch / with transfer", "torch / batched", "error"]  # fmt: skip
    rows = [
        [r.operation, f"{r.size}²", *(f"{1e3 * x:.3f}" for x in (r.torch, r.moved, r.single, r.batched)),
         f"{r.torch / r.moved:.2f}", f"{r.torch / r.batched:.2f}", f"{r.error:.0e}"]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)


def _attention_table(results: Sequence[AttentionResult]) -> str:
    head = ["keys", "density", "SDPA CPU ms", "Vulkan with transfer ms", "kernel ms", "TFLOP/s",
            "SDPA / with transfer", "error"]  # fmt: skip
    rows = [
        [str(r.keys), f"{r.density:.3f}", *(f"{1e3 * x:.2f}" for x in (r.sdpa, r.whole, r.kernel)),
         f"{r.tflops:.2f}", f"{r.sdpa / r.whole:.2f}", f"{r.error:.0e}"]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)
