"""`aat bench memory`: peak memory of one attention call, each in a process of its own, and how it grows with length.

Resident memory before the call is subtracted from its peak (Linux: VmRSS and VmHWM). glibc is told to give freed memory
back at once, so that the peak is what was in use, not what lay idle. The exponent is the slope of log memory over log
length between the shortest and the longest call.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from aat_hf.bench._common import environment, markdown_table
from aat_hf.bench._inputs import concentrated

WAYS = ("sdpa", "aat", "eager")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench memory", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--eager-up-to", type=int, default=8192, help="eager's matrices are quadratic")
    args = parser.parse_args(argv)
    if not Path("/proc/self/clear_refs").exists():
        parser.error("peaks are read from /proc: run this on Linux")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 16))  # of the processes that are started
    rows, peaks = [], {}
    for keys in args.lengths:
        ways = [way for way in WAYS if way != "eager" or keys <= args.eager_up_to]
        peaks[keys] = {way: _peak(way, keys, args.heads, args.head_dim, args.tolerance) for way in ways}
        rows.append([str(keys), *(f"{peaks[keys][way]:.0f}" if way in ways else "" for way in WAYS)])
    print(f"{args.heads} heads of {args.head_dim}, float32, causal, tolerance {args.tolerance:g}; {environment()}\n")
    print(markdown_table(["keys", *(f"{way}, MiB" for way in WAYS)], rows))
    first, last = min(args.lengths), max(args.lengths)
    if first < last:
        grown = {way: peaks[last][way] / max(peaks[first][way], 0.1) for way in ("sdpa", "aat")}
        text = ", ".join(f"{way} {math.log(ratio) / math.log(last / first):.2f}" for way, ratio in grown.items())
        print(f"\nexponent of memory over length, {first} to {last}: {text}")
    return 0


def _peak(way: str, keys: int, heads: int, head_dim: int, tolerance: float) -> float:
    """MiB that one call in a fresh process needs at its peak, its result among them."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, way, keys, heads, head_dim, tolerance))
    process.start()
    sender.close()
    try:
        peak = float(receiver.recv())
    except EOFError as error:
        raise RuntimeError(f"the process that ran {way} at {keys} keys ended without a result") from error
    finally:
        process.join()
    return peak


def _child(sender: object, way: str, keys: int, heads: int, head_dim: int, tolerance: float) -> None:
    import aat_hf

    torch.manual_seed(0)
    config = aat_hf.AATConfig(tolerance=tolerance, backend="cpu", min_length=0)  # tiled at any length and density
    ways: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        "sdpa": lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        "aat": lambda q, k, v: aat_hf.tiled_attention(q, k, v, config=config, is_causal=True, need_lse=False),
        "eager": _eager,
    }
    with torch.inference_mode():
        q, k, v = concentrated(600, heads, head_dim)  # loads the compiled kernels in every child
        aat_hf.tiled_attention(q, k, v, config=config.replace(dense_prefix=0), is_causal=True)
        q, k, v = concentrated(keys, heads, head_dim)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident("VmRSS")
        ways[way](q, k, v)
    sender.send(_resident("VmHWM") - before)  # type: ignore[attr-defined]


def _resident(field: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * q.shape[3] ** -0.5
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v
