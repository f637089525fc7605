"""`aat calibrate --device vulkan`: the fastest workgroup shapes of this device, and from where on it beats the CPU."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aat_hf.bench._inputs import random_map
from aat_hf.bench._timing import interleaved
from aat_hf.data.progress import notice, progress
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.vulkan import vulkan_attention
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import TileMap
from aat_hf.vulkan import attention, plain, profile
from aat_hf.vulkan.attention import Call
from aat_hf.vulkan.interface import Dispatch, Provider
from aat_hf.vulkan.lowering import vectors
from aat_hf.vulkan.profile import Costs, Direction, Profile
from aat_hf.vulkan.provider import get_provider
from aat_hf.vulkan.shapes import Shape, candidates
from aat_hf.vulkan.workspace import Workspace

_TUNED_KEYS = 4096  # where shapes are compared
_CALLS = ((256, 1.0), (1024, 1.0), (4096, 1.0), (4096, 0.25))  # keys and density of the calls that give the costs
_SOFTWARE_CALLS = ((64, 1.0), (128, 1.0), (256, 1.0), (256, 0.25))
_MATRICES = ((64, 1), (64, 20), (512, 1), (512, 20), (2048, 1))  # rows, and operations of a submission
_SOFTWARE_MATRICES = ((16, 1), (16, 20), (64, 1), (64, 5))
_BATCH = 20  # small operations in one submission, of the break-even that is printed


def run(args: argparse.Namespace) -> int:
    """Measure, print and store; 0."""
    provider = get_provider()
    software = provider.device.kind == "cpu"
    shapes: dict[str, Shape] = {}
    cases = list(product(args.dtypes, args.head_dims))
    with progress(f"Measuring {provider.device.name}", len(args.head_dims) + len(cases) + 1) as update:
        for number, dim in enumerate(args.head_dims):
            shapes |= tuned(provider, args.heads, dim, 128 if software else _TUNED_KEYS, args.rounds)
            update(number + 1)
        profile.save(provider.device, Profile(shapes, [], {}))  # the costs are those of the tuned shapes
        costs = []
        for number, (dtype, dim) in enumerate(cases):
            calls = _SOFTWARE_CALLS if software else _CALLS
            costs.append(measured(getattr(torch, dtype), args.heads, dim, calls, args.rounds))
            update(len(args.head_dims) + number + 1)
        operations = {name: _operation(provider, name, args.rounds) for name in plain.OPERATIONS}
        update(len(args.head_dims) + len(cases) + 1)
    for name, shape in shapes.items():
        print(f"{name}: {shape.threads} threads, {shape.rows} rows, chunks of {shape.chunk} vectors")
    for entry in costs:
        print(_told(entry, args.heads))
    for name, direction in operations.items():
        print(_told_of_operation(name, direction))
    notice(f"Wrote {profile.save(provider.device, Profile(shapes, costs, operations))}")
    return 0


def tuned(provider: Provider, heads: int, dim: int, keys: int, rounds: int) -> dict[str, Shape]:
    """The shape whose shader is the fastest, for every role and a head dimension, by the name it has in the profile."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, keys, dim) for _ in range(3))
    call = _call(q, random_map(q, 0.5))
    found = attention.forward(provider, q, k, v, call)
    width = vectors(dim)

    def forward(work: Workspace, shape: Shape) -> Dispatch:
        return attention.forward_dispatch(work, provider, q, k, v, call, shape)

    def backward(part: int, work: Workspace, shape: Shape) -> Dispatch:
        both = attention.backward_dispatches(work, (q, k, v), found[:2], found[:2], call, found.skipped, (shape, shape))
        return both[part]

    best = {}
    for role, prepare in (("forward", forward), ("queries", partial(backward, 0)), ("keys", partial(backward, 1))):
        offered = candidates(provider.device, role, width, width)
        seconds: dict[Shape, list[float]] = {shape: [] for shape in offered}
        for shape in rounds * offered:
            seconds[shape].append(_kernel_seconds(provider, partial(prepare, shape=shape)))
        best[profile.key(role, width, width)] = min(offered, key=lambda shape: median(seconds[shape]))
    return best


def _kernel_seconds(provider: Provider, prepare: Callable[[Workspace], Dispatch]) -> float:
    """Of a shader on what lies on the device: the transfers take as long with any shape, and hide the differences."""
    with Workspace(provider) as work:
        dispatch = prepare(work)
        work.run(dispatch)  # uploads, and compiles
        began = perf_counter()
        provider.submit([dispatch])
        return perf_counter() - began


def measured(dtype: torch.dtype, heads: int, dim: int, calls: tuple[tuple[int, float], ...], rounds: int) -> Costs:
    """Costs of `vulkan_attention` as it is called, lowering and transfers included, and of the CPU kernel."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {"forward": [], "backward": []}
    for keys, density in calls:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, heads, keys, dim, dtype=dtype, requires_grad=True) for _ in range(3))
        tile_map, mask = random_map(q, density), causal_mask(keys, keys, q.device)
        load = profile.load_of(q, k, v, tile_map)
        kernels = {"vulkan": vulkan_attention, "cpu": cpu_attention}
        with torch.no_grad():
            forward = interleaved(
                {name: partial(kernel, q, k, v, tile_map, mask, dim**-0.5) for name, kernel in kernels.items()}, rounds
            )
        outputs = {name: kernel(q, k, v, tile_map, mask, dim**-0.5)[0] for name, kernel in kernels.items()}
        backward = interleaved({name: partial(_gradients, x, (q, k, v)) for name, x in outputs.items()}, rounds)
        for way, times in (("forward", forward), ("backward", backward)):
            lines[way].append((*load, times["vulkan"].median, times["cpu"].median))
    return Costs(str(dtype).removeprefix("torch."), dim, *(fitted(np.array(lines[way])) for way in lines))


def _operation(provider: Provider, name: str, rounds: int) -> Direction:
    """Costs of a plain operation on square matrices, one and many in a submission, transfers included."""
    lines = []
    for size, count in _SOFTWARE_MATRICES if provider.device.kind == "cpu" else _MATRICES:
        torch.manual_seed(0)
        batch = [_matrices(name, size) for _ in range(count)]
        run = partial(plain.compute_many, name, batch)
        ways = {"vulkan": partial(plain.on_device, provider, name, batch), "cpu": partial(run, backend="torch")}
        times = interleaved(ways, rounds)
        lines.append((*plain.load_of(name, batch), times["vulkan"].median, times["cpu"].median))
    return fitted(np.array(lines))


def _matrices(name: str, size: int, device: str = "cpu") -> tuple[Tensor, ...]:
    return tuple(torch.randn(plain.arity(name), size, size, device=device))


def fitted(lines: np.ndarray[Any, np.dtype[np.float64]]) -> Direction:
    """Costs from measured calls (calls, 4): bytes, products, seconds through Vulkan, seconds on the CPU.

    Non-negative least squares of the relative errors, so that short calls count as much as long ones.
    """
    terms, seconds = np.column_stack([np.ones(len(lines)), lines[:, :2]]), lines[:, 2]
    relative = terms / seconds[:, None]
    best, least = np.zeros(3), math.inf
    for used in product((False, True), repeat=3):
        answer = np.zeros(3)
        answer[list(used)] = np.linalg.lstsq(relative[:, list(used)], np.ones(len(lines)), rcond=None)[0]
        error = float(np.square(relative @ answer - 1).sum())
        if (answer >= 0).all() and error < least:
            best, least = answer, error
    call, byte, each = map(float, best)
    return Direction(call, byte, each, float(lines[:, 3].sum() / lines[:, 1].sum()))


def _call(q: Tensor, tile_map: TileMap) -> Call:
    mask = causal_mask(q.shape[2], q.shape[2], q.device)
    return Call.of(tile_map, mask, q.shape[3] ** -0.5)


def _gradients(output: Tensor, leaves: tuple[Tensor, ...]) -> Any:
    return torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True)


def _told_of_operation(name: str, direction: Direction) -> str:
    """One line: the smallest square matrices for which the device is faster, alone and many in a submission."""
    found = []
    for count in (1, _BATCH):
        loads = {2**power: plain.load_of(name, [_matrices(name, 2**power, "meta")] * count) for power in range(4, 15)}
        shortest = next((size for size, load in loads.items() if direction.pays(*load)), None)
        found.append(f"from {shortest}²" if shortest else "never")
    return f"{name}: faster than the CPU {found[0]}, {_BATCH} in a submission {found[1]}"


def _told(entry: Costs, heads: int) -> str:
    """One line: the fewest keys of a dense causal call for which the device is faster, in each direction."""
    itemsize = getattr(torch, entry.dtype).itemsize
    found = []
    for way in ("forward", "backward"):
        direction: Direction = getattr(entry, way)
        lengths = (
            keys
            for keys in (2**power for power in range(6, 18))
            if direction.pays(3.0 * heads * keys * entry.head_dim * itemsize, heads * keys**2 * entry.head_dim)
        )
        shortest = next(lengths, None)
        found.append(f"{way} from {shortest} keys" if shortest else f"{way} never")
    return f"{entry.dtype} head_dim {entry.head_dim}: faster than the CPU {', '.join(found)} ({heads} heads, dense)"
