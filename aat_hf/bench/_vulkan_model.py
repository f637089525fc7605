"""A language model whose attention runs on a Vulkan device: what the memory pool and the pipeline cache counted.

Forward passes and training steps of random lengths take turns. Before them the loss and the gradients are compared with
those of the CPU kernel. Interrupted steps are reported as far as they went.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import aat_hf
from aat_hf.bench._common import load, markdown_table
from aat_hf.bench.attention import NumericalError
from aat_hf.data.pretrained import cache_dir
from aat_hf.data.progress import progress
from aat_hf.vulkan.buffers import PoolStatistics
from aat_hf.vulkan.interface import Provider
from aat_hf.vulkan.pipelines import CacheStatistics
from aat_hf.vulkan.workspace import pool_of

_LIMIT = 1e-4  # largest error of loss and gradients relative to the largest of each
_GROWTH = 0.01  # of resident memory that is noise
# Where drivers keep compiled shaders: Mesa, NVIDIA, and both where they follow the desktop's convention.
_DRIVER_CACHES = ("MESA_SHADER_CACHE_DIR", "__GL_SHADER_DISK_CACHE_PATH", "XDG_CACHE_HOME")
_COMPILE = "import sys; from aat_hf.bench import _vulkan_model; _vulkan_model.compile_attention(int(sys.argv[1]))"


@dataclass(frozen=True)
class Run:
    """What a run of so many steps counted, from the opening of the device.

    Attributes:
        interrupted: by Ctrl-C or SIGTERM, before the steps that were asked for.
        forward, training: median seconds of a step of each kind.
        resident: MiB of the process, its most in the second and in the last quarter of the steps, and after the
            first step; None where the system does not tell.
        cold, warm: pipelines of a new process, with an empty and with a filled cache of the driver.
    """

    steps: int
    interrupted: bool
    forward: float
    training: float
    pool: PoolStatistics
    pipelines: CacheStatistics
    resident: tuple[float, float, float] | None
    cold: CacheStatistics
    warm: CacheStatistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this part."""
    parser.add_argument("--steps", type=int, default=200, help="of the model; 0: no model")
    parser.add_argument("--model", help="a folder; default: GPT-2 with 4 layers of 8 heads and random weights")
    parser.add_argument("--step-lengths", type=int, nargs=2, default=[256, 1024], metavar=("SHORTEST", "LONGEST"))


def measure(provider: Provider, args: argparse.Namespace) -> Run:
    """Run the model.

    Raises:
        NumericalError: loss or gradients differ from the CPU kernel's.
    """
    shortest, longest = args.step_lengths
    model = _model(args.model, longest)
    generator = torch.Generator().manual_seed(0)
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    with progress("Compiling, cold and warm", 2) as update, tempfile.TemporaryDirectory() as folder:
        cold = _pipelines_of_a_process(provider, head_dim, Path(folder))
        update(1)
        warm = _pipelines_of_a_process(provider, head_dim, Path(folder))
    _compare(model, _tokens(model, shortest, generator))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    resident = []
    interrupted = True
    with suppress(KeyboardInterrupt), _terminable(), progress(f"Model on {provider.device.name}", args.steps) as update:
        for step in range(args.steps):
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            tokens, began = _tokens(model, length, generator), time.perf_counter()
            _step(model, tokens, training=bool(step % 2))
            seconds[bool(step % 2)].append(time.perf_counter() - began)
            resident.append(_resident_mib())
            update(step + 1)
        interrupted = False
    if not pool_of(provider).statistics.requested_total:
        raise NumericalError("no call of the model reached the device: there is nothing to count")
    forward, training = (median(seconds[kind] or [0.0]) for kind in (False, True))
    return Run(len(resident), interrupted, forward, training, pool_of(provider).statistics, provider.pipelines,
               _by_time(resident), cold, warm)  # fmt: skip


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM (of `timeout`, of a batch system) interrupts as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def table(run: Run) -> str:
    """A Markdown table: counter, value, and what it has to be."""
    pool, pipelines, mib = run.pool, run.pipelines, 2**20
    rows = [
        ("steps, forward and training in turn", f"{run.steps}{', interrupted' * run.interrupted}", ""),
        ("forward, training step (median)", f"{1e3 * run.forward:.1f}, {1e3 * run.training:.1f} ms", ""),
        ("pool: requests", str(pool.hits + pool.misses), ""),
        ("pool: hit rate", f"{pool.hit_rate:.2%}", "≥ 90 %"),
        ("pool: internal fragmentation", f"{pool.internal_fragmentation:.2%}", ""),
        ("pool: external fragmentation", f"{pool.external_fragmentation:.3%}", "< 1 %"),
        ("pool: high-water mark", f"{pool.high_water / mib:.1f} MiB", ""),
        ("pool: held, evictions", f"{pool.held / mib:.1f} MiB, {pool.evictions}", ""),
        ("pipelines: look-ups", str(pipelines.hits + pipelines.misses), ""),
        ("pipelines: hit rate", f"{pipelines.hit_rate:.2%}", "≥ 90 %"),
        ("pipelines: cost of a miss in this run", _miss(pipelines), ""),
        ("pipelines: cost of a miss, cold driver cache", _miss(run.cold), ""),
        ("pipelines: cost of a miss, warm driver cache", _miss(run.warm), "mean < 5 ms"),
    ]
    if run.resident is not None:
        start, middle, end = run.resident
        rows += [
            ("resident memory after the first step", f"{start:.1f} MiB", ""),
            ("resident memory, most in the second quarter", f"{middle:.1f} MiB", ""),
            ("resident memory, most in the last quarter", f"{end:.1f} MiB", f"≤ {(1 + _GROWTH) * middle:.1f} MiB"),
        ]
    return markdown_table(["counter", "value", "target"], rows)


def compile_attention(head_dim: int) -> None:
    """Forward and backward of a small call; print what its pipelines cost, as JSON."""
    from aat_hf.kernels.vulkan import vulkan_attention
    from aat_hf.tiling.masks import causal_mask
    from aat_hf.tiling.tile_map import TileMap
    from aat_hf.vulkan.provider import get_provider

    q, k, v = (torch.ones(1, 1, 64, head_dim, requires_grad=True) for _ in range(3))
    mask = causal_mask(64, 64, q.device)
    vulkan_attention(q, k, v, TileMap.dense(mask, 1, 1, 64, 16), mask, head_dim**-0.5)[0].sum().backward()
    print(json.dumps(asdict(get_provider().pipelines)))


def _pipelines_of_a_process(provider: Provider, head_dim: int, driver_cache: Path) -> CacheStatistics:
    """What `compile_attention` costs in a new process whose driver keeps its compiled shaders in `driver_cache`."""
    environment = {**os.environ, **dict.fromkeys(_DRIVER_CACHES, str(driver_cache)), "AAT_CACHE": str(cache_dir())}
    environment |= {"AAT_VULKAN_PROVIDER": provider.name, "AAT_VULKAN_DEVICE": str(provider.device.index)}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # finds what this process found
    command = [sys.executable, "-c", _COMPILE, str(head_dim)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return CacheStatistics(**json.loads(done.stdout.splitlines()[-1]))


def _model(name: str | None, longest: int) -> Any:
    """A causal language model with its attention on the device, tiled at any length."""
    if name is None:
        torch.manual_seed(0)
        sizes: dict[str, Any] = dict(n_layer=4, n_head=8, n_embd=512, n_positions=longest, vocab_size=1024)
        without: dict[str, Any] = dict(attn_pdrop=0, resid_pdrop=0, embd_pdrop=0, bos_token_id=None, eos_token_id=None)
        model = GPT2LMHeadModel(GPT2Config(**sizes, **without))
        model.loss_type = "ForCausalLM"
    else:
        model, _ = load(name)
    model.set_attn_implementation("aat")
    aat_hf.configure(model, backend="vulkan", min_length=0, dense_prefix=0, sink_keys=16, local_keys=0)
    return model


def _tokens(model: Any, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=generator)


def _step(model: Any, tokens: Tensor, training: bool) -> None:
    """Prefill, or loss and gradients."""
    if not training:
        with torch.inference_mode():
            model.eval()(tokens, use_cache=False, logits_to_keep=1)
        return
    model.train()(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()


def _compare(model: Any, tokens: Tensor) -> None:
    """Loss and gradients with the device against those with the CPU kernel."""
    results = []
    for backend in ("cpu", "vulkan"):
        aat_hf.configure(model, backend=backend)
        loss = model.train()(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(x.grad for x in model.parameters() if x.grad is not None)])
        model.zero_grad()
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-20)) for a, b in zip(*results, strict=True))
    if not error < _LIMIT:
        raise NumericalError(f"loss or gradients differ from the CPU kernel's by {error:.1e}: nothing is reported")


def _by_time(resident: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Of the first step, and the most of the second and of the last quarter."""
    known = [value for value in resident if value is not None]
    quarter = len(known) // 4
    return (known[0], max(known[quarter : 2 * quarter]), max(known[3 * quarter :])) if quarter else None


def _resident_mib() -> float | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else None


def _miss(pipelines: CacheStatistics) -> str:
    mean, slowest = 1e3 * pipelines.mean_miss_seconds, 1e3 * pipelines.slowest_miss_seconds
    return f"mean {mean:.2f}, slowest {slowest:.2f} ms ({pipelines.misses})"
