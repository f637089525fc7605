"""Plain operations, one or many in a submission: add, mul, relu, softmax and matmul of float32 tensors on the CPU.

`compute` runs them where they were measured to be faster, the transfers included: on the Vulkan device or in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aat_hf.vulkan import lowering, profile
from aat_hf.vulkan.interface import Buffer, Dispatch, Provider
from aat_hf.vulkan.lowering import VECTOR, vectors
from aat_hf.vulkan.provider import get_provider
from aat_hf.vulkan.workspace import Content, Workspace

OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "mul": torch.mul,
    "relu": torch.relu,
    "softmax": lambda a: a.softmax(-1),
    "matmul": torch.matmul,
}
"""The operations as torch computes them, by name; relu and softmax (over the last dimension) take one tensor."""
BACKENDS = ("auto", "vulkan", "torch")
_ELEMENTWISE = {"add": 0, "mul": 1, "relu": 2}  # OPERATION in elementwise.comp
_MATMUL_LANES = 16  # LANES in matmul.comp


def compute(operation: str, *inputs: Tensor, backend: str = "auto") -> Tensor:
    """`compute_many` for a single operation."""
    return compute_many(operation, [inputs], backend=backend)[0]


def compute_many(operation: str, batch: Sequence[tuple[Tensor, ...]], *, backend: str = "auto") -> list[Tensor]:
    """One operation on many inputs, in one submission where the device computes.

    Args:
        operation: a name of `OPERATIONS`.
        batch: the inputs of each: one tensor, or two of one shape; matmul takes (batch, rows, depth) and (batch,
            depth, columns), or both without batch. Scores of softmax below -1e30 count as -1e30 on the device.
        backend: "vulkan", "torch", or "auto": the device for float32 tensors on the CPU that want no gradient, and
            only where `aat calibrate --device vulkan` measured it to be faster; never a software driver.

    Raises:
        ValueError: an unknown operation or backend; or the device was asked for, but cannot take the inputs.
        VulkanError: the device was asked for and failed.
    """
    if operation not in OPERATIONS or backend not in BACKENDS:
        raise ValueError(f"{operation!r} on {backend!r}: there are {', '.join(OPERATIONS)} on {', '.join(BACKENDS)}")
    refused = next((why for inputs in batch if (why := _refused(operation, inputs))), None)
    if backend == "vulkan" and refused is not None:
        raise ValueError(f'{refused}: use backend="auto" or "torch"')
    if backend == "vulkan" or (backend == "auto" and refused is None and pays(operation, batch)):
        return on_device(get_provider(), operation, batch)
    return [OPERATIONS[operation](*inputs) for inputs in batch]


def pays(operation: str, batch: Sequence[tuple[Tensor, ...]]) -> bool:
    """Whether the device was measured to be faster for this batch, the transfers included."""
    costs = profile.measured().operations.get(operation)
    return costs is not None and costs.pays(*load_of(operation, batch))


def arity(operation: str) -> int:
    """How many tensors an operation takes."""
    return 1 if operation in ("relu", "softmax") else 2


def load_of(operation: str, batch: Sequence[tuple[Tensor, ...]]) -> tuple[float, float]:
    """Bytes moved there and back, and elements computed (products, for matmul)."""
    sizes = [sum(x.numel() for x in inputs) for inputs in batch]
    if operation == "matmul":
        results = [a.shape[:-1].numel() * b.shape[-1] for a, b in batch]
        work = [size * inputs[0].shape[-1] for size, inputs in zip(results, batch, strict=True)]
    else:
        results = work = [inputs[0].numel() for inputs in batch]
    return 4.0 * (sum(sizes) + sum(results)), float(sum(work))


def on_device(provider: Provider, operation: str, batch: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """The results, computed in one submission; inputs as `compute_many` takes them for "vulkan"."""
    calls = [_PREPARED[operation](provider, operation, *inputs) for inputs in batch]
    with Workspace(provider) as work:
        taken = iter(work.buffers(*(content for call in calls for content in call.contents)))
        buffers = [[next(taken) for _ in call.contents] for call in calls]
        dispatches = [call.dispatch(mine) for call, mine in zip(calls, buffers, strict=True)]
        work.run(*dispatches, fetch=tuple(mine[-1] for mine in buffers))
        return [call.read(mine[-1]) for call, mine in zip(calls, buffers, strict=True)]


def elementwise_dispatch(
    provider: Provider, operation: str, a: Buffer, b: Buffer, result: Buffer, elements: int
) -> Dispatch:
    """a + b, a * b or max(a, 0) of so many elements in buffers of float32 rows."""
    count, threads = vectors(elements), lowering.threads(provider)
    groups = lowering.spread(provider, -(-count // threads))
    return Dispatch("elementwise", (a, b, result), groups, (threads, _ELEMENTWISE[operation]), (count,))


def matmul_dispatch(
    provider: Provider, a: Buffer, b: Buffer, result: Buffer, sizes: tuple[int, int, int, int]
) -> Dispatch:
    """a b in buffers of float32 rows; sizes (batch, rows, depth, columns), depth a multiple of 4."""
    batch, rows, depth, columns = sizes
    threads, each = (16, 4) if provider.device.kind == "cpu" else (256, 8) if min(rows, columns) > 512 else (128, 8)
    tile = threads // _MATMUL_LANES * each
    groups = -(-vectors(columns) // (2 * _MATMUL_LANES)), -(-rows // tile), batch
    return Dispatch("matmul", (a, b, result), groups, (threads, each), (rows, depth, vectors(columns)))


class _Call(NamedTuple):
    """One operation: what its buffers hold, the result's last; its dispatch over them; how the result is read."""

    contents: tuple[Content, ...]
    dispatch: Callable[[list[Buffer]], Dispatch]
    read: Callable[[Buffer], Tensor]


def _elementwise(provider: Provider, operation: str, *inputs: Tensor) -> _Call:
    shape, flat = inputs[0].shape, torch.Size((inputs[0].numel(),))
    return _Call(
        (*(x.reshape(-1) for x in inputs), lowering.room(flat)),
        lambda mine: elementwise_dispatch(provider, operation, mine[0], mine[-2], mine[-1], flat.numel()),
        lambda result: lowering.read_rows(result, torch.empty(flat)).view(shape),
    )


def _softmax(provider: Provider, _: str, a: Tensor) -> _Call:
    rows, columns = a.shape[:-1].numel(), a.shape[-1]
    threads, groups = 8 if provider.device.kind == "cpu" else 128, lowering.spread(provider, rows)
    return _Call(
        (a.detach().contiguous().numpy(), 4 * a.numel()),
        lambda mine: Dispatch("row_softmax", tuple(mine), groups, (threads,), (rows, columns)),
        lambda result: torch.from_numpy(lowering.read_words(result, tuple(a.shape), np.float32)),
    )


def _matmul(provider: Provider, _: str, a: Tensor, b: Tensor) -> _Call:
    shape = torch.Size((*a.shape[:-1], b.shape[-1]))
    a, b = (x if x.ndim == 3 else x[None] for x in (a, b))
    padding = -a.shape[2] % VECTOR  # rows of b that meet the padding of a
    b = torch.nn.functional.pad(b, (0, 0, 0, padding)) if padding else b
    sizes = (*a.shape[:2], *b.shape[1:])
    return _Call(
        (a, b, lowering.room(shape)),
        lambda mine: matmul_dispatch(provider, mine[0], mine[1], mine[2], sizes),
        lambda result: lowering.read_rows(result, torch.empty(shape)),
    )


_PREPARED: dict[str, Callable[..., _Call]] = {
    "add": _elementwise,
    "mul": _elementwise,
    "relu": _elementwise,
    "softmax": _softmax,
    "matmul": _matmul,
}


def _refused(operation: str, inputs: tuple[Tensor, ...]) -> str | None:
    """Why the device cannot take the inputs."""
    if any(x.device.type != "cpu" or x.dtype != torch.float32 for x in inputs):
        found = ", ".join(f"{x.dtype} on {x.device}" for x in inputs)
        return f"the Vulkan device takes float32 tensors on the CPU, not {found}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "plain operations have no gradients on the Vulkan device"
    if len(inputs) != arity(operation):
        return f"{operation} takes {arity(operation)} tensors, not {len(inputs)}"
    shapes = [tuple(x.shape) for x in inputs]
    if operation == "matmul":
        fits = (len(shapes[0]) == len(shapes[1]) and len(shapes[0]) in (2, 3) and shapes[0][-1] == shapes[1][-2]
                and shapes[0][:-2] == shapes[1][:-2])  # fmt: skip
    else:
        fits = len(set(shapes)) == 1 and len(shapes[0]) > 0
    if not fits or not all(x.numel() for x in inputs):
        return f"the Vulkan device has no {operation} of shapes {', '.join(map(str, shapes))}"
    return None
