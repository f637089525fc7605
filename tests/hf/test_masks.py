"""The library's own masks are the reference: `interpret` must say the same for every row and every tile."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import using
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_checks import check
from torch import Tensor
from transformers import AttentionMaskInterface, DynamicCache, MistralConfig, StaticCache
from transformers import masking_utils as library

from aat_hf.hf.masks import LazyMask, aat_mask, from_argument, interpret
from aat_hf.tiling.masks import AttentionMask, FunctionMask, IntervalMask

AttentionMaskInterface.register("aat", aat_mask)
CPU = torch.device("cpu")
WINDOW, CHUNK = 6, 8


def both(creator: Any, queries: int, interval: bool, batch: int = 2, **kwargs: Any) -> AttentionMask:
    """Make a mask by a library function under "aat" and "eager", compare, and return the interpreted one."""
    fields = dict(sliding_window=WINDOW, attention_chunk_size=CHUNK, is_causal=True)
    embeds = torch.zeros(batch, queries, 4)
    made = [
        creator(SimpleNamespace(_attn_implementation=name, **fields), inputs_embeds=embeds, **kwargs)
        for name in ("aat", "eager")
    ]
    lazy, additive = made
    assert isinstance(lazy, LazyMask)
    expected = torch.ones(lazy.shape, dtype=torch.bool) if additive is None else additive == 0
    assert lazy.shape == expected.shape and lazy.ndim == lazy.dim() == 4 and lazy.contiguous() is lazy
    assert torch.equal(lazy.materialise(), expected)
    mask = interpret(lazy)
    assert isinstance(mask, IntervalMask) == interval
    check(mask, expected)
    through, bias = from_argument(
        lazy, batch=batch, heads=2, queries=queries, keys=lazy.shape[3], is_causal=True, device=CPU
    )
    assert bias is None
    check(through, expected)
    return mask


def dense(rule: Any, batch: int, queries: int, keys: int, use_vmap: bool = False) -> Tensor:
    """The library's own table of a rule, made without any of our code: bool (batch, 1, queries, keys)."""
    table = library.sdpa_mask(batch, queries, keys, mask_function=rule, allow_is_causal_skip=False, use_vmap=use_vmap)
    assert table is not None
    return table


CAUSAL = [
    library.create_causal_mask,
    library.create_sliding_window_causal_mask,
    library.create_chunked_causal_mask,
]
BIDIRECTIONAL = [library.create_bidirectional_mask, library.create_bidirectional_sliding_window_mask]


def padding(kind: str, length: int) -> Tensor | None:
    """2-D masks of a batch of two."""
    if kind == "none":
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    if kind in ("left", "both"):
        mask[0, :5] = 0
    if kind in ("right", "both"):
        mask[1, -3:] = 0
    return mask


def filled(cache: Any, seen: int, heads: int = 1) -> Any:
    """The cache after `seen` tokens."""
    states = torch.zeros(2, heads, seen, 4)
    cache.update(states, states, 0)
    return cache


def mistral(window: int | None = None) -> MistralConfig:
    return MistralConfig(
        hidden_size=4,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        num_hidden_layers=1,
        sliding_window=window,
    )


@pytest.mark.parametrize("pad", ["none", "left", "right", "both", "ones"])
@pytest.mark.parametrize("creator", CAUSAL)
def test_causal_masks_without_a_cache(creator: Any, pad: str) -> None:
    both(creator, 21, True, attention_mask=padding(pad, 21), **using(None))


@pytest.mark.parametrize("pad", ["none", "left", "right"])
@pytest.mark.parametrize("creator", BIDIRECTIONAL)
def test_bidirectional_masks(creator: Any, pad: str) -> None:
    both(creator, 21, True, attention_mask=padding(pad, 21))


def test_cross_attention_has_the_keys_of_the_encoder() -> None:
    encoder = torch.zeros(2, 13, 4)
    both(
        library.create_bidirectional_mask,
        5,
        True,
        attention_mask=padding("both", 13),
        encoder_hidden_states=encoder,
    )


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("kind", ["dynamic", "static", "sliding", "static-sliding"])
@pytest.mark.parametrize("creator", CAUSAL)
def test_caches_shift_queries_and_keys(creator: Any, kind: str, pad: str, queries: int) -> None:
    seen = 17
    make = {
        "dynamic": lambda: DynamicCache(),
        "static": lambda: StaticCache(mistral(), max_cache_len=32),
        "sliding": lambda: DynamicCache(config=mistral(WINDOW)),
        "static-sliding": lambda: StaticCache(mistral(WINDOW), max_cache_len=32),
    }
    cache = filled(make[kind](), seen)
    both(creator, queries, True, attention_mask=padding(pad, seen + queries), **using(cache))


def test_the_counter_of_a_static_cache_is_copied() -> None:
    cache = filled(StaticCache(mistral(), max_cache_len=16), 5)
    config = SimpleNamespace(_attn_implementation="aat", is_causal=True)
    embeds = torch.zeros(2, 1, 4)
    lazy = library.create_causal_mask(config, embeds, None, cache)
    filled(cache, 1)
    assert interpret(lazy).rows(torch.arange(1)).sum(-1).unique().tolist() == [6]


@pytest.mark.parametrize("starts", [[0, 7, 15], [0, 1, 2]])
@pytest.mark.parametrize("creator", CAUSAL)
def test_packed_documents_are_intervals(creator: Any, starts: list[int]) -> None:
    index = torch.arange(21)
    begin = torch.stack([torch.tensor(starts)[torch.bucketize(index, torch.tensor(starts), right=True) - 1]] * 2)
    begin[1] = 0
    positions = index - begin
    both(creator, 21, True, attention_mask=None, **using(None), position_ids=positions)
    both(creator, 21, True, attention_mask=None, **using(None), position_ids=positions[:1])


RULES = [
    library.causal_mask_function,
    library.bidirectional_mask_function,
    library.sliding_window_causal_mask_function(3),
    library.sliding_window_bidirectional_mask_function(2),
    library.chunked_causal_mask_function(3, torch.tensor([1, 2])),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(RULES), st.lists(st.integers(-3, 9), min_size=10, max_size=10), st.data())
def test_any_positions(rule: Any, jumps: list[int], data: st.DataObject) -> None:
    """Documents that start anywhere, also at negative positions; jumps of 1 continue a document."""
    jumps = [jump if data.draw(st.booleans()) else 1 for jump in jumps]
    positions = torch.tensor([jumps, jumps[::-1]]).cumsum(-1)
    ids = library.find_packed_sequence_indices(positions)
    if ids is not None and hasattr(library, "packed_sequence_compatibility_function"):
        rule = library.packed_sequence_compatibility_function(rule, positions, ids)
    elif ids is not None:
        rule = library.and_masks(rule, library.packed_sequence_mask_function(ids))
    mask = interpret(aat_mask(batch_size=2, q_length=10, kv_length=10, mask_function=rule))
    assert isinstance(mask, IntervalMask)
    check(mask, dense(rule, 2, 10, 10))


def test_scattered_document_ids_are_no_interval() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 0, 0, 2, 2]])
    rule = library.and_masks(library.causal_mask_function, library.packed_sequence_mask_function(ids))
    lazy = aat_mask(batch_size=1, q_length=8, kv_length=8, mask_function=rule)
    mask = interpret(lazy)
    assert isinstance(mask, FunctionMask)
    check(mask, dense(rule, 1, 8, 8))


def image_block(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= 3) & (q < 9) & (k >= 3) & (k < 9)


def only_even(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k % 2 == 0


@pytest.mark.parametrize("pad", ["none", "left"])
@pytest.mark.parametrize("creator", CAUSAL)
def test_user_functions_are_asked(creator: Any, pad: str) -> None:
    common = dict(attention_mask=padding(pad, 21), **using(None))
    both(creator, 21, False, or_mask_function=image_block, **common)
    both(creator, 21, False, and_mask_function=only_even, **common)
    both(creator, 21, False, or_mask_function=image_block, and_mask_function=only_even, **common)


def test_user_functions_may_index_their_own_tensors() -> None:
    table = torch.rand(2, 21, generator=torch.Generator().manual_seed(0)) > 0.5

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table[b, k] | (q == k)

    for cache in (None, filled(DynamicCache(), 17)):
        queries = 21 if cache is None else 4
        both(
            library.create_causal_mask,
            queries,
            False,
            attention_mask=None,
            **using(cache),
            and_mask_function=rule,
        )


@pytest.mark.parametrize("creator", CAUSAL[:2])
def test_blocks_of_images(creator: Any) -> None:
    ids = torch.full((2, 21), -1)
    ids[0, 2:8], ids[1, 4:9], ids[1, 12:20] = 0, 0, 1
    both(creator, 21, False, attention_mask=padding("left", 21), **using(None), block_sequence_ids=ids)


def test_a_function_that_only_looks_like_the_library_s_is_asked() -> None:
    def sliding_window_overlay(sliding_window: int) -> Any:
        def inner_mask(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return k < q - sliding_window

        return inner_mask

    rule = sliding_window_overlay(3)
    lazy = aat_mask(batch_size=1, q_length=9, kv_length=9, mask_function=rule)
    mask = interpret(lazy)
    assert not isinstance(mask, IntervalMask)
    check(mask, dense(rule, 1, 9, 9))


def test_predicates_take_index_tensors_of_any_rank() -> None:
    for use_vmap in (False, True):
        rule = library.or_masks(library.causal_mask_function, image_block)
        lazy = aat_mask(batch_size=2, q_length=12, kv_length=12, mask_function=rule, use_vmap=use_vmap)
        mask, table = interpret(lazy), dense(rule, 2, 12, 12, use_vmap)
        b, q = torch.tensor([0, 1, 1]), torch.tensor([3, 4, 11])
        h, k = torch.zeros(3, dtype=torch.long), torch.tensor([8, 10, 2])
        assert torch.equal(mask.allowed(b, h, q, k), table[b, h, q, k])
        shaped = (b.view(3, 1, 1, 1, 1), torch.zeros(1, dtype=torch.long), q.view(1, 3, 1, 1), k.view(3, 1))
        assert torch.equal(mask.allowed(*shaped), table[shaped])
