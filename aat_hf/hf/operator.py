"""One layer's tiled attention, and the same as an opaque, differentiable operator for torch.compile.

The operator finds its layer when it runs: selection, kernel, audit and recorders run inside it, with the settings in
force at that time. Only whether a layer may tile at all is decided when the graph is made.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from aat_hf.attention import TiledAttentionResult, tiled_attention
from aat_hf.config import AATConfig
from aat_hf.hf.settings import settings_of
from aat_hf.kernels import router
from aat_hf.report.record import recorders_of
from aat_hf.tiling.masks import AttentionMask, IntervalMask, TensorMask

SUPPORTED = TorchVersion(torch.__version__) >= "2.13"  # older tracers cannot make a constant of a module
_layers: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()


def run_layer(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, **how: Any
) -> TiledAttentionResult:
    """`tiled_attention` with the layer's settings; its recorders are told."""
    recorders = recorders_of(module)
    config = _settings(module)
    audit = config.audit == "always" or (config.audit == "recorded" and bool(recorders))
    keys = key.shape[2]
    in_vain = config.backend == "auto" and config.mode == "tiled" and router.lost_lately(module, keys, config)
    used = config.replace(mode="dense") if in_vain else config
    result = tiled_attention(
        query, key, value, config=used, attn_mask=mask, need_lse=False, need_cells=bool(recorders), audit=audit, **how
    )
    if in_vain:
        result = dataclasses.replace(result, reason=f"{router.FASTER}: this layer's last maps kept too much")
    else:
        router.remember(module, keys, config, result.reason)
    for recorder in recorders:
        recorder.add(module, result, query.shape[2], keys)
        recorder.inspect(module, query, key, mask, how)
    return result


def _settings(module: nn.Module) -> AATConfig:
    """The settings of a layer, for queries and keys that the interface has lifted."""
    return settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None)).flat


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def layer_number(module: nn.Module) -> int:
    """A number under which the operator finds `module`."""
    _layers[id(module)] = module
    return id(module)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def shortest_tiled(module: nn.Module) -> int:
    """Fewest keys with which the layer tiles, by its settings now; -1 when it never does."""
    config = settings_of(getattr(module, "config", None), getattr(module, "layer_idx", None))
    if config.mode == "dense" or config.tolerance == 0:
        return -1
    first = next(module.parameters(), torch.zeros(()))
    return router.shortest(config, first.device, first.dtype, getattr(module, "head_dim", 64))


def _mask(
    key: Tensor, first: Tensor | None, last: Tensor | None, valid: Tensor | None, table: Tensor | None
) -> AttentionMask:
    if first is not None and last is not None:
        return IntervalMask(first, last, key.shape[2], valid)
    assert table is not None  # one of the two always is
    return TensorMask(table)


@torch.library.custom_op("aat_hf::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    valid: Tensor | None,
    table: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Output (batch, heads, queries, value_dim) of layer number `layer`.

    The mask is `IntervalMask(first, last, keys, valid)` or, where `first` is None, `TensorMask(table)`.
    """
    mask = _mask(key, first, last, valid, table)
    result = run_layer(_layers[layer], query, key, value, mask, scale=scale, softcap=softcap, sinks=sinks)
    return result.output.contiguous()


@attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, last: Tensor | None, valid: Tensor | None,
    table: Tensor | None, sinks: Tensor | None, layer: int, scale: float, softcap: float | None,
) -> Tensor:  # fmt: skip
    return value.new_empty(*query.shape[:3], value.shape[3])


@torch.library.custom_op("aat_hf::attention_backward", mutates_args=())
def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    valid: Tensor | None,
    table: Tensor | None,
    sinks: Tensor | None,
    layer: int,
    scale: float,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of query, key, value (and sinks), the forward pass recomputed: selection repeats bit for bit."""
    module = _layers[layer]
    config = _settings(module)
    inputs = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
    # an operator runs below autograd: let it record in here
    recording = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with torch.enable_grad(), recording:
        output = tiled_attention(
            *inputs[:3],
            config=config,
            attn_mask=_mask(key, first, last, valid, table),
            scale=scale,
            softcap=softcap,
            sinks=inputs[3] if sinks is not None else None,
            need_lse=False,
            audit=False,
        ).output
    found = torch.autograd.grad(output, inputs, gradient)
    return [x.contiguous() for x in found]


@attention_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, first: Tensor | None, last: Tensor | None,
    valid: Tensor | None, table: Tensor | None, sinks: Tensor | None, layer: int, scale: float, softcap: float | None,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape) for x in (query, key, value, sinks) if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.how = inputs[8:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    found = attention_backward(gradient, *ctx.saved_tensors, *ctx.how)
    sinks = found[3] if len(found) > 3 else None
    return *found[:3], None, None, None, None, sinks, None, None, None


attention.register_autograd(_backward, setup_context=_keep)
