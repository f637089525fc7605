"""A single query: the kernel against float64, its certificate, and every layout of a cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aat_hf import AATConfig, tiled_attention
from aat_hf.kernels.cpu_decode import decode_attention
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.masks import IntervalMask

CONFIG = AATConfig(tolerance=0.1, key_tile=16, decode_from=0, dense_prefix=0, max_kept=1.0)
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
ROW = torch.zeros(1, dtype=torch.long)


def inputs(batch, kv_heads, group, keys, dim, value_dim, gain=3.0, dtype=torch.float32):
    q = gain * torch.randn(batch, kv_heads * group, 1, dim)
    k, v = torch.randn(batch, kv_heads, keys, dim), torch.randn(batch, kv_heads, keys, value_dim)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def visible(keys, first=0, last=None, key_valid=None, batch=1):
    edges = torch.full((batch, 1), first), torch.full((batch, 1), keys if last is None else last)
    return IntervalMask(*edges, keys, key_valid)


def check(q, k, v, mask, config=CONFIG, scale=0.3, softcap=None, sinks=None):
    """Output and log-sum-exp are those of the kept tiles, the loss is exact and within the tolerance."""
    found = decode_attention(q, k, v, mask, config, scale, softcap, sinks)
    wide = [x.double() for x in (q, k, v)]
    seen = mask.rows(ROW)
    kept = seen & found.tile_map.exact.repeat_interleave(config.key_tile, -1)[..., : k.shape[2]]
    wanted, lse, _ = reference_attention(*wide, kept, scale, softcap, sinks)
    _, exact, _ = reference_attention(*wide, seen, scale, softcap, sinks)
    limit = LIMIT[q.dtype]
    assert found.output.dtype == v.dtype
    assert (found.output - wanted).norm() <= limit * wanted.norm() + 1e-30
    lost = 1 - torch.exp(lse - exact.nan_to_num(neginf=0.0))
    alive = exact > -math.inf
    assert torch.allclose(found.lost[alive], lost[alive], atol=2e-6)
    assert (found.lost[alive] <= config.tolerance + 1e-6).all()
    if sinks is None:
        assert torch.allclose(found.lse.double(), lse, atol=1e-5)
    return found


@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 2600), st.sampled_from([1, 5, 16, 64, 65]),
    st.sampled_from([1, 8, 40, 64]), st.sampled_from([16, 48, 1000]), st.sampled_from([0.0, 0.02, 0.3, 0.9]),
)  # fmt: skip
def test_shapes_and_tiles(batch, kv_heads, group, keys, dim, value_dim, key_tile, tolerance):
    config = CONFIG.replace(key_tile=key_tile, summary_keys=key_tile, tolerance=tolerance)
    check(*inputs(batch, kv_heads, group, keys, dim, value_dim), visible(keys), config)


@pytest.mark.parametrize("dtype", LIMIT)
def test_dtypes(dtype):
    assert check(*inputs(2, 2, 3, 1500, 64, 64, dtype=dtype), visible(1500)).tile_map.density.max() < 1


@given(st.integers(0, 1500), st.integers(0, 1500), st.booleans(), st.booleans())
def test_windows_padding_caps_and_sinks(first, last, padded, more):
    valid = torch.arange(1500) >= torch.tensor([[0], [700]]) if padded else None
    mask = visible(1500, first, last, valid, batch=2)
    q, k, v = inputs(2, 2, 2, 1500, 16, 16)
    unseen = ~mask.rows(ROW)[:, 0, 0, :].expand(2, 1500)
    k.transpose(1, 2)[unseen] = math.nan  # what a query may not see is never read into a result
    wide_k = k.nan_to_num(nan=0.0)
    extras = (5.0, torch.randn(4)) if more else (None, None)
    found = decode_attention(q, k, v, mask, CONFIG, 0.3, *extras)
    clean = check(q, wide_k, v, mask, CONFIG, 0.3, *extras)
    assert torch.equal(found.output, clean.output)


def test_a_query_without_keys_gives_zero():
    q, k, v = inputs(1, 1, 2, 1100, 16, 16)
    found = decode_attention(q, k, v, visible(1100, 5, 5), CONFIG, 0.3)
    assert not found.output.any() and (found.lse == -math.inf).all() and found.lost.isnan().all()


@pytest.mark.parametrize("tolerance", [0.01, 0.1, 0.5])
def test_hardly_more_tiles_are_kept_than_needed(tolerance):
    q, k, v = inputs(2, 2, 3, 8000, 32, 32)
    kept = check(q, k, v, visible(8000), CONFIG.replace(tolerance=tolerance)).tile_map.exact.sum(-1).flatten()
    scores = torch.einsum("bhgd,bhkd->bhgk", q.unflatten(1, (2, 3))[:, :, :, 0], k) * 0.3
    mass = scores.double().softmax(-1).unflatten(-1, (-1, 16)).sum(-1).flatten(0, 2)
    fewest = mass.shape[1] - (mass.sort(-1).values.cumsum(-1) <= tolerance).sum(-1)
    assert (kept >= fewest).all() and (kept <= 1.03 * fewest + 1).all()


def test_a_head_that_keeps_too_much_keeps_all():
    q, k, v = inputs(1, 1, 2, 1300, 32, 32, gain=0.01)
    found = check(q, k, v, visible(1300), CONFIG.replace(max_kept=0.8))
    assert (found.tile_map.density == 1).all() and not found.lost.any()


def test_huge_scores_do_not_overflow():
    q, k, v = inputs(1, 2, 2, 3000, 64, 64, gain=1e4)
    check(q, k, v, visible(3000), CONFIG.replace(tolerance=0.01))


@pytest.mark.parametrize("layout", ["preallocated", "transposed", "expanded", "every_other"])
def test_a_cache_is_read_where_it_lies(layout):
    q, k, v = inputs(2, 3, 2, 1300, 32, 32)
    make = {
        "preallocated": lambda x: torch.cat([x, torch.full((2, 3, 700, 32), math.nan)], 2)[:, :, :1300],
        "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
        "every_other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    }[layout]
    k, v = make(k), make(v)
    found = decode_attention(q, k, v, visible(1300), CONFIG, 0.3)
    if layout in ("transposed", "every_other"):
        assert found is None
    else:
        assert torch.equal(found.output, check(q, k.contiguous(), v.contiguous(), visible(1300)).output)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_go_to_exact_attention(value):
    q, k, v = inputs(1, 1, 2, 1300, 32, 32)
    k[0, 0, 900, 3] = value
    assert decode_attention(q, k, v, visible(1300), CONFIG, 0.3) is None
    found = tiled_attention(q, k, v, config=CONFIG)
    assert found.path == "dense"
    exact = tiled_attention(q, k, v, config=CONFIG.replace(tolerance=0.0))
    assert torch.equal(found.output.isnan(), exact.output.isnan())


def test_threads_do_not_change_a_bit():
    q, k, v = inputs(1, 3, 3, 20000, 64, 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(decode_attention(q, k, v, visible(20000), CONFIG, 0.3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].output, found[1].output) and torch.equal(found[0].lse, found[1].lse)


DENSE = {
    "short": dict(config=CONFIG.replace(decode_from=1301)),
    "prefix": dict(config=CONFIG.replace(dense_prefix=1300)),
    "exact": dict(config=CONFIG.replace(tolerance=0.0)),
    "coarse": dict(config=CONFIG.replace(coarse=True)),
    "gather": dict(config=CONFIG.replace(backend="gather")),
    "mode": dict(config=CONFIG.replace(mode="dense")),
    "bias": dict(bias=torch.zeros(1, 1, 1, 1300)),
    "weights": dict(need_weights=True),
    "dropout": dict(dropout=0.1),
    "table": dict(attn_mask=torch.ones(1, 1, 1, 1300, dtype=torch.bool)),
    "window": dict(attn_mask=visible(1300, 900), config=CONFIG.replace(decode_from=500)),
}


@pytest.mark.parametrize("case", sorted(DENSE))
def test_what_stays_exact(case):
    q, k, v = inputs(1, 1, 2, 1300, 32, 32)
    assert tiled_attention(q, k, v, **{"config": CONFIG, **DENSE[case]}).path == "dense"


def test_gradients_stay_exact():
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 2, 1300, 32, 32))
    assert tiled_attention(q, k, v, config=CONFIG).path == "dense"
    with torch.no_grad():
        assert tiled_attention(q, k, v, config=CONFIG).path == "skip"


def test_the_result_says_what_was_lost():
    q, k, v = inputs(2, 2, 2, 3000, 32, 32)
    found = tiled_attention(q, k, v, config=CONFIG)
    exact = tiled_attention(q, k, v, config=CONFIG.replace(tolerance=0.0))
    assert found.path == "skip" and found.reason is None
    lost = 1 - torch.exp(found.lse - exact.lse)
    assert torch.allclose(found.audit.infidelity.float(), lost, atol=1e-5) and 0 < lost.max() <= 0.1
    assert torch.allclose(found.estimated.float(), lost[..., 0], atol=1e-5)
    assert tiled_attention(q, k, v, config=CONFIG, audit=False).audit is None
