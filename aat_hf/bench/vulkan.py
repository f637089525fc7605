"""`aat bench vulkan`: a Vulkan device against torch on the CPU, with and without the transfers.

Plain operations on square matrices: alone, with the copies to and from the device, and many in one submission. Tiled
attention: dense and sparse causal maps against SDPA, and where the time goes (`_vulkan_attention`). Measured rows, the
dearest part of selection: against the CPU kernel, which computes them so far. A model: the counters of the memory pool
and the pipeline cache over many steps (`_vulkan_model`). Nothing is timed whose numbers disagree with torch's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aat_hf.bench import _vulkan_attention, _vulkan_model
from aat_hf.bench._common import environment, markdown_table, write_csv
from aat_hf.bench._timing import interleaved
from aat_hf.bench.attention import NumericalError
from aat_hf.config import AATConfig
from aat_hf.data.progress import notice
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.measure import measure_rows
from aat_hf.vulkan import ops, plain
from aat_hf.vulkan.interface import Provider
from aat_hf.vulkan.lowering import room
from aat_hf.vulkan.provider import get_provider
from aat_hf.vulkan.workspace import Workspace, pool_of

_LIMIT = 2e-6  # largest error of a plain operation relative to its largest result
_ROWS_LIMIT = 1e-5  # of measured rows: both sides are float32
_OPERATIONS = ("add", "mul", "relu", "matmul")


@dataclass(frozen=True)
class OperationResult:
    """One plain operation on (size, size) matrices: median seconds a call.

    Attributes:
        torch: torch on the CPU; moved: on the device, copies there and back included.
        single: on the device, one submission of one dispatch; batched: one of many that do not await each other.
    """

    operation: str
    size: int
    torch: float
    moved: float
    single: float
    batched: float
    error: float


@dataclass(frozen=True)
class RowsResult:
    """Rows measured for a causal selection: median seconds on the CPU, and on the device with the transfers."""

    keys: int
    rows: int
    cpu: float
    whole: float
    error: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0, or 130 when the model was interrupted, whose counters are printed all the same."""
    parser = argparse.ArgumentParser(prog="aat bench vulkan", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 1024, 2048], help="of the matrices")
    parser.add_argument("--operations", nargs="+", choices=_OPERATIONS, default=_OPERATIONS)
    parser.add_argument("--batch", type=int, default=20, help="operations of a batched submission")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--provider", choices=["kompute", "vulkan"], help="binding; default: as elsewhere")
    parser.add_argument("--out", type=Path, help="write the attention table as CSV to this file")
    _vulkan_model.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.provider is not None:
        os.environ["AAT_VULKAN_PROVIDER"] = args.provider
    provider = get_provider()
    print(f"{environment()}\n{provider.device.name} through {provider.name}\n")
    if args.steps:  # first: what is counted begins with the process
        counted = _vulkan_model.measure(provider, args)
        print(f"{_vulkan_model.table(counted)}\n", flush=True)
        if counted.interrupted:
            return 130
    operations = [_operation(provider, name, size, args) for name in args.operations for size in args.sizes]
    if operations:
        print(f"{_operation_table(operations, args.batch)}\n")
    lines = [
        _vulkan_attention.measure(provider, keys, density, args) for keys in args.lengths for density in args.densities
    ]
    if lines:
        print(f"{_vulkan_attention.table(lines)}\n\n{_vulkan_attention.table_of_parts(lines)}\n")
        print(_rows_table([_rows(provider, keys, args) for keys in args.lengths]))
    if lines and args.out is not None:
        write_csv(args.out, lines)
        notice(f"Wrote {args.out}")
    return 0


def _operation(provider: Provider, name: str, size: int, args: argparse.Namespace) -> OperationResult:
    torch.manual_seed(0)
    pool_of(provider).trim()  # every case has buffers of its own size
    a, b = torch.randn(2, size, size)
    inputs = (a, b)[: plain.arity(name)]

    def moved() -> Tensor:
        return plain.on_device(provider, name, [inputs])[0]

    expected = plain.OPERATIONS[name](*(x.double() for x in inputs))
    error = float((moved() - expected).abs().max() / expected.abs().max())
    if not error < _LIMIT:
        raise NumericalError(f"{name} of size {size} has relative error {error:.1e}: no time is reported")
    with Workspace(provider) as work:
        left, right, result = work.buffers(a, b, room((size, size)))
        if name == "matmul":
            dispatch = plain.matmul_dispatch(provider, left, right, result, (1, size, size, size))
        else:
            dispatch = plain.elementwise_dispatch(provider, name, left, right, result, size * size)
        work.run(dispatch)
        times = interleaved(
            {
                "torch": partial(plain.OPERATIONS[name], *inputs),
                "moved": moved,
                "single": partial(provider.submit, [dispatch]),
                "batched": partial(provider.submit, _vulkan_attention.independent(work, dispatch, 2, args.batch)),
            },
            args.rounds,
        )
    seconds = {key: timing.median for key, timing in times.items()}
    seconds["batched"] /= args.batch
    return OperationResult(name, size, **seconds, error=error)


@torch.inference_mode()
def _rows(provider: Provider, keys: int, args: argparse.Namespace) -> RowsResult:
    torch.manual_seed(0)
    pool_of(provider).trim()
    config = AATConfig()
    q, k = (torch.randn(1, args.heads, keys, args.head_dim) for _ in range(2))
    rows = torch.arange(0, keys, config.sample_stride)
    call = q, k, causal_mask(keys, keys, q.device), rows, config.key_tile, args.head_dim**-0.5
    on_cpu, on_device = measure_rows(*call).probability, ops.measure_rows(provider, *call).probability
    error = float((on_cpu - on_device).abs().max() / on_cpu.max())
    if not error < _ROWS_LIMIT:
        raise NumericalError(f"measured rows of {keys} keys have relative error {error:.1e}: no time is reported")
    ways = {"cpu": partial(measure_rows, *call), "whole": partial(ops.measure_rows, provider, *call)}
    times = interleaved(ways, args.rounds)
    return RowsResult(keys, len(rows), times["cpu"].median, times["whole"].median, error)


def _operation_table(results: Sequence[OperationResult], batch: int) -> str:
    head = ["operation", "size", "torch CPU ms", "with transfer ms", "single ms", f"one of {batch} ms",
            "torch / with transfer", "torch / batched", "error"]  # fmt: skip
    rows = [
        [r.operation, f"{r.size}²", *(f"{1e3 * x:.3f}" for x in (r.torch, r.moved, r.single, r.batched)),
         f"{r.torch / r.moved:.2f}", f"{r.torch / r.batched:.2f}", f"{r.error:.0e}"]
        for r in results
    ]  # fmt: skip
    return markdown_table(head, rows)


def _rows_table(results: Sequence[RowsResult]) -> str:
    head = ["keys", "measured rows", "CPU ms", "Vulkan with transfer ms", "CPU / with transfer", "error"]
    rows = [
        [
            str(r.keys),
            str(r.rows),
            f"{1e3 * r.cpu:.2f}",
            f"{1e3 * r.whole:.2f}",
            f"{r.cpu / r.whole:.2f}",
            f"{r.error:.0e}",
        ]
        for r in results
    ]
    return markdown_table(head, rows)
