"""Inputs, maps, masks and the float64 oracle that the tests of the kernels share."""

from __future__ import annotations

import torch

from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.masks import FunctionMask, IntervalMask, TensorMask, causal_mask, full_mask
from aat_hf.tiling.tile_map import COARSE, EXACT, TileMap

CPU = torch.device("cpu")
MASKS = ["full", "causal", "window", "left padding", "packed", "per head", "tensor"]


def inputs(batch, heads, kv_heads, queries, keys, dim, value_dim=None, dtype=torch.float32):
    shapes = ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim or dim))
    return tuple(torch.randn(batch, *shape).to(dtype).requires_grad_() for shape in shapes)


def random_map(mask, batch, heads, query_tile, key_tile, density=1.0):
    """A random part of the tiles exact, some coarse (to be ignored), the others culled; the first column is kept."""
    states = mask.tile_states(query_tile, key_tile)
    shape = (batch, heads, *states.shape[2:])
    levels = torch.where(torch.rand(shape) < density, EXACT, torch.where(torch.rand(shape) < 0.3, COARSE, 0))
    levels[..., 0] = EXACT
    return TileMap.from_dense(levels.to(torch.uint8), states, query_tile, key_tile)


def oracle(q, k, v, tile_map, mask, scale, softcap=None):
    kept = tile_map.exact.repeat_interleave(tile_map.query_tile, 2).repeat_interleave(tile_map.key_tile, 3)
    allowed = kept[:, :, : q.shape[2], : k.shape[2]] & mask.rows(torch.arange(q.shape[2]))
    return reference_attention(q, k, v, allowed, scale, softcap)[:2]


def distance(a, b):
    return float(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).detach())


def check(tensors, tile_map, mask, scale=None, softcap=None, forward=1e-6, backward=1e-5):
    """Output, log-sum-exp and gradients through both against float64."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    found = cpu_attention(*tensors, tile_map, mask, scale, softcap)
    compare(tensors, found, doubles, oracle(*doubles, tile_map, mask, scale, softcap), forward, backward)
    return found


def compare(tensors, found, doubles, expected, forward, backward):
    """Output and log-sum-exp `found` from `tensors` and `expected` from `doubles`, and gradients through both."""
    (output, lse), (wanted, wanted_lse) = found, expected
    finite = wanted_lse.isfinite()
    assert output.dtype == tensors[2].dtype and lse.dtype == torch.float32
    assert torch.equal(finite, lse.isfinite())
    assert (output[~finite] == 0).all() and torch.isneginf(lse[~finite]).all()
    assert distance(output, wanted) < forward
    assert torch.allclose(lse[finite].double(), wanted_lse[finite], rtol=1e-6, atol=max(2e-5, forward))
    weight, row_weight = torch.randn(output.shape), torch.randn(lse.shape)
    grads = []
    for out, log, leaves in ((output, lse, tensors), (wanted, wanted_lse, doubles)):
        loss = (out * weight.to(out.dtype)).sum() + (log * row_weight.to(log.dtype))[finite].sum()
        grads.append(torch.autograd.grad(loss, leaves))
    for mine, theirs in zip(*grads, strict=True):
        assert distance(mine, theirs) < backward


def masks(batch, heads, queries, keys, reach=50, document=77):
    """Every kind of mask; `reach` of the window, length of a packed `document`."""
    ramp = torch.arange(queries)[None] + keys - queries
    valid = torch.ones(batch, keys, dtype=torch.bool)
    valid[-1, : keys // 3] = False
    part = torch.arange(queries) // document * document
    table = torch.rand(batch, heads, queries, keys) < 0.3
    table[:, :, 5:6] = False
    return {
        "full": full_mask(queries, keys, CPU),
        "causal": causal_mask(queries, keys, CPU),
        "window": IntervalMask((ramp - reach).clamp(min=0), ramp + 1, keys),
        "left padding": causal_mask(queries, keys, CPU, key_valid=valid),
        "packed": IntervalMask(part[None], part[None] + document, keys),
        "per head": FunctionMask(lambda b, h, i, j: table[b, h, i, j], batch, queries, keys, CPU, heads),
        "tensor": TensorMask(table[:1, :1]),
    }
