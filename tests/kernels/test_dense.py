from __future__ import annotations

import pytest
import torch
from inputs import peaked

from aat_hf import AATConfig, tiled_attention
from aat_hf.kernels.reference import reference_attention


@pytest.mark.parametrize("masked", ["none", "shared", "by head", "nothing seen"])
@pytest.mark.parametrize("queries", [1, 3])
def test_exact_attention_with_grouped_keys(masked, queries):
    q, k, v = (x.requires_grad_() for x in peaked(2, 6, 2, queries, 50, 16, dtype=torch.float64))
    table = torch.rand(2, 6 if masked == "by head" else 1, queries, 50) < 0.5
    table[0] &= masked != "nothing seen"
    mask = None if masked == "none" else table
    result = tiled_attention(q, k, v, config=AATConfig(tolerance=0), attn_mask=mask, need_lse=False)
    allowed = torch.ones(2, 6, queries, 50, dtype=torch.bool) if mask is None else mask.expand(2, 6, -1, -1)
    expected = reference_attention(q, k, v, allowed, 0.25)[0]
    assert torch.allclose(result.output, expected, atol=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(o.sin().sum(), (q, k, v)) for o in (result.output, expected)),
                             strict=True):  # fmt: skip
        assert torch.allclose(found, wanted, atol=1e-12)
