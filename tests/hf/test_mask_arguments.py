"""What reaches an attention function as mask, against the dense table; interval masks against brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_checks import check
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from aat_hf.hf.masks import from_argument
from aat_hf.tiling.masks import AttentionMask, FunctionMask, IntervalMask, TensorMask, causal_mask

CPU = torch.device("cpu")


def argument(mask: Any, queries: int, keys: int, is_causal: bool, batch: int = 2) -> tuple[AttentionMask, Any]:
    return from_argument(mask, batch=batch, heads=2, queries=queries, keys=keys, is_causal=is_causal, device=CPU)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (5, 9), (1, 9)])
@pytest.mark.parametrize("is_causal", [True, False])
def test_none_means_what_sdpa_of_the_library_does(queries: int, keys: int, is_causal: bool) -> None:
    expected = torch.ones(1, 1, queries, keys, dtype=torch.bool)
    if is_causal and queries > 1:
        expected = expected.tril()
    mask, bias = argument(None, queries, keys, is_causal)
    assert bias is None
    check(mask, expected)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("queries", "seen", "keys"), [(7, 7, 7), (2, 7, 7), (2, 7, 12), (2, 9, 7)])
def test_two_dimensional_padding(queries: int, seen: int, keys: int, is_causal: bool) -> None:
    pad = torch.ones(2, seen, dtype=torch.bool)
    pad[0, :3] = False
    valid = torch.nn.functional.pad(pad[:, -keys:], (0, max(0, keys - seen)))
    expected = valid[:, None, None].expand(2, 1, queries, keys)
    if is_causal:
        expected = expected & torch.ones(queries, keys, dtype=torch.bool).tril(min(seen, keys) - queries)
    mask, bias = argument(pad, queries, keys, is_causal)
    assert bias is None
    check(mask, expected)


@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (1, 2, 3, 11), (2, 1, 1, 8)])
def test_four_dimensional_boolean(shape: tuple[int, ...]) -> None:
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask, bias = argument(dense, 3, 8, True)
    assert bias is None
    check(mask, dense[..., :8].expand(-1, -1, 3, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("forbidden", ["min", "-inf"])
def test_four_dimensional_additive(dtype: torch.dtype, forbidden: str) -> None:
    low = torch.finfo(dtype).min if forbidden == "min" else float("-inf")
    allowed = torch.rand(2, 1, 3, 8, generator=torch.Generator().manual_seed(2)) > 0.4
    plain = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, low)
    mask, bias = argument(plain, 3, 8, False)
    assert bias is None
    check(mask, allowed)
    values = torch.randn(allowed.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    mask, bias = argument(values.masked_fill(~allowed, low), 3, 8, False)
    check(mask, allowed)
    assert torch.equal(bias[allowed], values[allowed]) and torch.isfinite(bias).all()


def test_block_mask_with_heads() -> None:
    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k + h) % 2 == 0)

    blocks = create_block_mask(rule, 1, 2, 16, 16, device="cpu", BLOCK_SIZE=8)
    index = torch.arange(16)
    expected = rule(index[:1], torch.arange(2)[None, :, None, None], index[:, None], index[None, :])
    check(argument(blocks, 16, 16, True, batch=1)[0], expected)


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, 3, 4), "causal", [[1]]])
def test_anything_else_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="attention_mask"):
        argument(wrong, 3, 3, True)


@st.composite
def intervals(draw: st.DrawFn) -> tuple[IntervalMask, Tensor]:
    """An interval mask and its dense form, by brute force."""
    batch, queries, keys = draw(st.integers(1, 2)), draw(st.integers(1, 12)), draw(st.integers(1, 12))
    numbers = st.lists(st.integers(-2, 14), min_size=batch * queries, max_size=batch * queries)
    first, last = (torch.tensor(draw(numbers)).view(batch, queries) for _ in range(2))
    bits = draw(st.none() | st.lists(st.booleans(), min_size=batch * keys, max_size=batch * keys))
    valid = None if bits is None else torch.tensor(bits).view(batch, keys)
    k = torch.arange(keys)
    dense = (k >= first[..., None]) & (k < last[..., None])
    dense = dense if valid is None else dense & valid[:, None]
    return IntervalMask(first, last, keys, valid), dense[:, None]


@settings(max_examples=150, deadline=None)
@given(intervals())
def test_intervals_against_brute_force(case: tuple[IntervalMask, Tensor]) -> None:
    mask, dense = case
    check(mask, dense)
    check(TensorMask(dense), dense)
    predicate = lambda b, h, q, k: dense[b, torch.zeros_like(h), q, k]  # noqa: E731
    check(FunctionMask(predicate, dense.shape[0], *dense.shape[2:], CPU), dense)


def test_causal_mask_defaults_to_the_last_key() -> None:
    check(causal_mask(3, 7, CPU), torch.ones(1, 1, 3, 7, dtype=torch.bool).tril(4))
