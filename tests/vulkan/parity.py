"""The Vulkan kernel against float64: what its tests compare, and how closely."""

from __future__ import annotations

import kernel_cases
import torch
from kernel_cases import oracle

from aat_hf.kernels.vulkan import vulkan_attention

LIMIT = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}


def masks(batch, heads, queries, keys):
    return kernel_cases.masks(batch, heads, queries, keys, reach=20, document=23)


def distance(found, expected):
    """Largest error relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def run(tensors, tile_map, mask, scale, softcap=None):
    """Output, log-sum-exp and the gradients of a weighted sum of both."""
    output, lse = vulkan_attention(*tensors, tile_map, mask, scale, softcap)
    return output.detach(), lse.detach(), *gradients(output, lse, tensors)


def gradients(output, lse, leaves):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in (output, lse)]
    loss = (output * weights[0]).sum() + (lse * weights[1])[lse.isfinite()].sum()
    return torch.autograd.grad(loss, leaves)


def check(tensors, tile_map, mask, scale=None, softcap=None):
    """Output, log-sum-exp and gradients through both against float64, and the same bits a second time."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    limit = LIMIT[tensors[0].dtype]
    found = run(tensors, tile_map, mask, scale, softcap)
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    expected, expected_lse = oracle(*doubles, tile_map, mask, scale, softcap)
    wanted = gradients(expected, expected_lse, doubles)
    finite = expected_lse.isfinite()
    assert found[0].dtype == tensors[2].dtype and found[1].dtype == torch.float32
    assert torch.equal(finite, found[1].isfinite())
    assert (found[0][~finite] == 0).all() and torch.isneginf(found[1][~finite]).all()
    assert distance(found[0], expected.detach()) < limit
    assert distance(found[1][finite], expected_lse[finite].detach()) < LIMIT[torch.float32]
    for mine, theirs in zip(found[2:], wanted, strict=True):
        assert distance(mine, theirs) < limit
    for one, other in zip(found, run(tensors, tile_map, mask, scale, softcap), strict=True):
        assert torch.equal(one, other)
