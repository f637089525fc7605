"""A `LazyMask` stands for a tensor, compiles, and stays small."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inputs import Largest
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers import masking_utils as library

from aat_hf.hf.masks import aat_mask, from_argument
from aat_hf.tiling.masks import IntervalMask

AttentionMaskInterface.register("aat", aat_mask)
CPU = torch.device("cpu")
CAUSAL = [
    library.create_causal_mask,
    library.create_sliding_window_causal_mask,
    library.create_chunked_causal_mask,
]


def test_a_mask_that_is_ready_is_returned() -> None:
    lazy = aat_mask(batch_size=1, q_length=3, kv_length=3)
    dense = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    assert aat_mask(batch_size=1, q_length=3, kv_length=3, attention_mask=lazy) is lazy
    assert aat_mask(batch_size=1, q_length=3, kv_length=3, attention_mask=dense) is dense


def test_lazy_mask_stands_for_a_tensor() -> None:
    lazy = aat_mask(batch_size=2, q_length=4, kv_length=6, q_offset=2)
    assert lazy.dtype == torch.bool and lazy.to(CPU) is lazy and lazy.device == CPU
    assert torch.equal(lazy[:, :, :, :3], lazy.materialise()[:, :, :, :3])
    moved = lazy.to(torch.device("meta"), non_blocking=True)
    assert moved.device.type == "meta" and lazy.device == CPU
    huge = aat_mask(batch_size=1, q_length=1 << 20, kv_length=1 << 20)
    with pytest.raises((MemoryError, NotImplementedError), match="attn_implementation"):
        huge[:, :, :, :5]


def test_lazy_mask_under_fullgraph_compile() -> None:
    def made(x: Tensor, pad: Tensor, start: Tensor) -> Tensor:
        rule = library.sliding_window_causal_mask_function(3)
        lazy = aat_mask(
            batch_size=2,
            q_length=4,
            kv_length=8,
            q_offset=start,
            mask_function=rule,
            attention_mask=pad,
            device=x.device,
        )
        return x.masked_fill(~lazy.contiguous().materialise(), 0.0)

    x, pad, start = torch.ones(2, 1, 4, 8), torch.ones(2, 6, dtype=torch.bool), torch.tensor(2)
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, pad, start), made(x, pad, start))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("creator", CAUSAL)
def test_long_inputs_need_linear_memory(creator: Any, packed: bool) -> None:
    length = 65536
    pad = torch.ones(1, length, dtype=torch.bool)
    pad[:, :1000] = False
    positions = torch.arange(length)[None] % 5000
    config = SimpleNamespace(_attn_implementation="aat", sliding_window=4096, attention_chunk_size=8192)
    with Largest() as largest:
        embeds = torch.zeros(1, length, 1)
        lazy = creator(config, embeds, None if packed else pad, None, position_ids=positions if packed else None)
        mask = from_argument(lazy, batch=1, heads=4, queries=length, keys=length, is_causal=True, device=CPU)[0]
        states = mask.tile_states(128, 128)
        mask.row_has_keys()
    assert isinstance(mask, IntervalMask) and states.shape == (1, 1, 512, 512)
    assert largest.seen <= 8 * length
