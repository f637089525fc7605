from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CPU, MASKS, compare, distance, inputs, masks, random_map

from aat_hf.kernels.coarse import centroids
from aat_hf.kernels.cpu import cpu_attention
from aat_hf.kernels.cpu_coarse import coarse_backward, coarse_forward, cpu_coarse_attention
from aat_hf.kernels.lowered_tiles import lower_tiles, rows_of
from aat_hf.kernels.reference import reference_attention
from aat_hf.tiling.masks import causal_mask, full_mask
from aat_hf.tiling.tile_map import COARSE, EXACT, TileMap


def oracle(q, k, v, tile_map, mask, scale, softcap=None):
    """Masked attention over keys and centroids side by side, a centroid biased by the logarithm of its tile's size."""
    levels = tile_map.to_dense().repeat_interleave(tile_map.query_tile, 2)[:, :, : q.shape[2]]
    exact = (levels == EXACT).repeat_interleave(tile_map.key_tile, 3)[..., : k.shape[2]]
    allowed = torch.cat([exact & mask.rows(torch.arange(q.shape[2])), levels == COARSE], -1)
    parts = [x.split(tile_map.key_tile, 2) for x in (k, v)]
    all_k, all_v = (torch.cat([x, *(part.mean(2, True) for part in p)], 2) for x, p in zip((k, v), parts, strict=True))
    sizes = torch.tensor([1] * k.shape[2] + [part.shape[2] for part in parts[0]], dtype=k.dtype)
    return reference_attention(q, all_k, all_v, allowed, scale, softcap, bias=sizes.log())[:2]


def check(tensors, tile_map, mask, scale=None, softcap=None, forward=1e-6, backward=1e-5):
    """Output, log-sum-exp and gradients through both against float64; the exact tiles' against the kernel's own."""
    scale = tensors[0].shape[-1] ** -0.5 if scale is None else scale
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    output, lse, lse_exact = cpu_coarse_attention(*tensors, tile_map, mask, scale, softcap)
    assert torch.equal(lse_exact, cpu_attention(*tensors, tile_map, mask, scale, softcap)[1])
    assert not lse_exact.requires_grad
    expected = oracle(*doubles, tile_map, mask, scale, softcap)
    compare(tensors, (output, lse), doubles, expected, forward, backward)
    return output


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_masks_grouped_heads_and_softcap(name, softcap):
    mask = masks(2, 4, 300, 300)[name]
    check(inputs(2, 4, 2, 300, 300, 32), random_map(mask, 2, 4, 64, 32, 0.4), mask, 0.5, softcap)


@pytest.mark.parametrize("tiles", [(16, 16), (20, 100), (64, 16), (300, 17), (1024, 1024)])
@pytest.mark.parametrize(("queries", "keys"), [(257, 2570), (123, 519), (1, 40)])
def test_ragged_lengths_and_tiles(tiles, queries, keys):
    """The last key tile is shorter, and the first rows have more centroids than a block of keys."""
    mask = full_mask(queries, keys, CPU)
    tile_map = random_map(mask, 1, 3, *tiles, 0.3)
    levels = tile_map.to_dense()
    levels[:, :, 0, 1:] = levels[..., -1:] = COARSE
    tile_map = TileMap.from_dense(levels, tile_map.states, *tiles)
    check(inputs(1, 3, 1, queries, keys, 24, 40), tile_map, mask, 0.5)


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.bfloat16, 4e-3, 8e-3), (torch.float16, 5e-4, 1e-3)])
def test_half_precision_is_rounded_once(dtype, forward, backward):
    mask = causal_mask(300, 300, CPU)
    tile_map, tensors = random_map(mask, 1, 4, 64, 16, 0.3), inputs(1, 4, 2, 300, 300, 33, dtype=dtype)
    output = check(tensors, tile_map, mask, forward=forward, backward=backward)
    wide, _, _ = cpu_coarse_attention(*(x.float() for x in tensors), tile_map, mask, 33**-0.5)
    assert torch.equal(output, wide.to(dtype))


@pytest.mark.parametrize("factor", [1e2, -1e4])
def test_extreme_scores(factor):
    mask = causal_mask(200, 200, CPU)
    tensors = inputs(1, 2, 2, 200, 200, 16)
    check(tensors, random_map(mask, 1, 2, 64, 16, 0.3), mask, factor / 16, forward=2e-2, backward=5e-1)


def test_tiles_of_equal_keys_and_values_lose_nothing():
    q, k, v = (x.detach() for x in inputs(1, 4, 2, 130, 330, 16))
    k, v = (x[:, :, ::16].repeat_interleave(16, 2)[:, :, :330].contiguous() for x in (k, v))
    mask = full_mask(130, 330, CPU)
    tile_map = TileMap.dense(mask, 1, 4, 64, 16)
    levels = torch.where(torch.rand(tile_map.shape) < 0.7, COARSE, EXACT).to(torch.uint8)
    output, lse, _ = cpu_coarse_attention(q, k, v, TileMap.from_dense(levels, tile_map.states, 64, 16), mask, 0.25)
    doubles, everything = (x.double() for x in (q, k, v)), torch.ones(1, 1, 130, 330, dtype=torch.bool)
    expected, expected_lse, _ = reference_attention(*doubles, everything, 0.25)
    assert distance(output, expected) < 1e-6 and torch.allclose(lse.double(), expected_lse, atol=1e-5)


def test_without_coarse_tiles_it_is_the_exact_kernel():
    mask = causal_mask(200, 200, CPU)
    tensors, levels = inputs(1, 2, 1, 200, 200, 16), random_map(mask, 1, 2, 32, 32, 0.5).to_dense()
    exact = TileMap.from_dense(levels.masked_fill(levels == COARSE, 0), mask.tile_states(32, 32), 32, 32)
    found, expected = (f(*tensors, exact, mask, 1.0)[:2] for f in (cpu_coarse_attention, cpu_attention))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    grads = [torch.autograd.grad(out.sin().sum() + lse.sum(), tensors) for out, lse in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_rows_with_centroids_only_and_rows_without_keys():
    mask = full_mask(96, 100, CPU)
    levels = torch.zeros(1, 2, 3, 4, dtype=torch.uint8)
    levels[:, :, 0], levels[:, 1, 2, 3] = COARSE, EXACT
    check(inputs(1, 2, 2, 96, 100, 8), TileMap.from_dense(levels, mask.tile_states(32, 32), 32, 32), mask)


def operator_arguments(tensors, tile_map, mask, softcap=None):
    means = [x.detach().requires_grad_() for x in centroids(*tensors[1:], tile_map.key_tile)[1:]]
    coarse = (torch.from_numpy(x) for x in rows_of(tile_map, COARSE)[:2])
    return *tensors, *means, *lower_tiles(tile_map, mask), *coarse, tile_map.query_tile, tile_map.key_tile, 0.3, softcap


def small_arguments(softcap=None):
    mask = causal_mask(70, 70, CPU)
    return operator_arguments(inputs(1, 2, 1, 70, 70, 8), random_map(mask, 1, 2, 32, 16, 0.3), mask, softcap)


def test_gradients_do_not_depend_on_the_number_of_threads():
    mask = causal_mask(1024, 1024, CPU)
    tile_map, tensors = random_map(mask, 1, 4, 64, 16, 0.3), inputs(1, 4, 2, 1024, 1024, 40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            arguments = operator_arguments(tensors, tile_map, mask)
            output, lse, _ = coarse_forward(*arguments)
            grads = torch.autograd.grad(output.square().sum() + lse.sin().sum(), arguments[:5])
            results.append((output, lse, *grads))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck(softcap):
    arguments = small_arguments(softcap)
    torch.library.opcheck(coarse_forward, arguments)
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    output, lse, _ = coarse_forward(*detached)
    gradients = torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(coarse_backward, (*gradients, *detached[:11], output, lse, *detached[11:]))


def test_compiles_without_a_graph_break():
    arguments = small_arguments()

    def loss(q, k, v, *others):
        output, lse, _ = coarse_forward(q * 1.5, k, v, *others)
        return output.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*arguments), arguments[:5]) for f in (loss, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_float64_is_refused_with_a_remedy():
    mask = full_mask(40, 40, CPU)
    tensors = (x.double() for x in inputs(1, 1, 1, 40, 40, 8))
    with pytest.raises(TypeError, match='backend="gather"'):
        cpu_coarse_attention(*tensors, TileMap.dense(mask, 1, 1, 32, 32), mask, 1.0)


@st.composite
def cases(draw):
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = draw(st.integers(1, 2)), heads * group, heads, draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dims, tiles = ((draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 70), (16, 140)))
    softcap, seed = draw(st.sampled_from([None, None, 3.0])), draw(st.integers(0, 999))
    return lengths, dims, tiles, draw(st.sampled_from(MASKS)), draw(st.floats(0, 1)), softcap, seed


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_cases(case):
    (batch, heads, kv_heads, queries, keys), dims, tiles, name, density, softcap, seed = case
    torch.manual_seed(seed)
    mask = masks(batch, heads, queries, keys)[name]
    tensors = inputs(batch, heads, kv_heads, queries, keys, *dims)
    tile_map = random_map(mask, batch, heads, *tiles, density)
    # gradients that all but cancel (a single key) are known to fewer digits
    check(tensors, tile_map, mask, 1 / math.sqrt(dims[0]), softcap, forward=2e-6, backward=1e-4)
