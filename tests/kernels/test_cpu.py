from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import CPU, MASKS, check, inputs, masks, random_map

from aat_hf.kernels import cpu
from aat_hf.kernels.cpu import cpu_attention, cpu_skip_attention, tiled_forward
from aat_hf.kernels.lowered_tiles import lower_tiles
from aat_hf.tiling.masks import IntervalMask, causal_mask, full_mask
from aat_hf.tiling.tile_map import EXACT, TileMap


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("density", [1.0, 0.4])
def test_masks(name, density):
    mask = masks(2, 4, 300, 300)[name]
    check(inputs(2, 4, 2, 300, 300, 32), random_map(mask, 2, 4, 64, 32, density), mask)


@pytest.mark.parametrize("dim", [1, 3, 32, 40, 64, 80, 128, 256])
def test_head_dims(dim):
    mask = causal_mask(150, 150, CPU)
    check(inputs(1, 2, 1, 150, 150, dim), random_map(mask, 1, 2, 64, 64, 0.7), mask)


@pytest.mark.parametrize("tiles", [(16, 16), (20, 100), (64, 128), (300, 17), (1024, 1024)])
@pytest.mark.parametrize(("queries", "keys"), [(257, 257), (123, 519), (200, 90), (1, 40)])
def test_ragged_lengths_and_tiles(tiles, queries, keys):
    mask = causal_mask(queries, keys, CPU)
    check(inputs(1, 3, 1, queries, keys, 24, 40), random_map(mask, 1, 3, *tiles, 0.6), mask)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25, 0.1])
def test_densities_with_grouped_heads(density):
    mask = causal_mask(1024, 1024, CPU)
    check(inputs(1, 6, 2, 1024, 1024, 64), random_map(mask, 1, 6, 64, 64, density), mask)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("name", ["full", "causal", "per head"])
def test_softcap(softcap, name):
    mask = masks(1, 2, 200, 200)[name]
    tensors = inputs(1, 2, 2, 200, 200, 32)
    check(tensors, random_map(mask, 1, 2, 64, 64), mask, scale=0.7, softcap=softcap)


@pytest.mark.parametrize(("dtype", "forward", "backward"), [(torch.bfloat16, 4e-3, 8e-3), (torch.float16, 5e-4, 1e-3)])
@pytest.mark.parametrize("dim", [33, 64])
def test_half_precision_is_rounded_once(dtype, forward, backward, dim):
    """Computed in float32: what the output loses is its own rounding."""
    mask = causal_mask(300, 300, CPU)
    tile_map, tensors = random_map(mask, 1, 4, 64, 64, 0.6), inputs(1, 4, 2, 300, 300, dim, dtype=dtype)
    output, _ = check(tensors, tile_map, mask, forward=forward, backward=backward)
    wide, _ = cpu_attention(*(x.float() for x in tensors), tile_map, mask, dim**-0.5)
    assert torch.equal(output, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number_is_read_and_written(dtype):
    """One key: the output is v, for all numbers of the format, denormals, infinities and NaN among them."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[numbers.isfinite()].view(-1, 1)
    rows = numbers[: len(numbers) // 16 * 16].view(1, 1, -1, 16)
    length = rows.shape[2]
    own = torch.arange(length)[None]
    mask = IntervalMask(own, own + 1, length)
    zeros = torch.zeros(1, 1, length, 1, dtype=dtype)
    output, _ = cpu_attention(zeros, zeros, rows, TileMap.dense(mask, 1, 1, 64, 64), mask, 1.0)
    assert torch.equal(output, rows)


def test_extreme_scores():
    mask = causal_mask(200, 200, CPU)
    tile_map = random_map(mask, 1, 2, 64, 64)
    q, k, v = inputs(1, 2, 2, 200, 200, 16)
    for factor in (1e4, -1e4, 1e2):
        check((q, k, v), tile_map, mask, scale=factor / 16, forward=2e-2, backward=5e-1)
    low = tuple((x + shift).detach().requires_grad_() for x, shift in ((q, 100.0), (k, -100.0), (v, 0.0)))
    check(low, tile_map, mask, scale=0.1, forward=1e-2, backward=5e-2)


def test_nothing_kept():
    mask = causal_mask(100, 100, CPU)
    tile_map = TileMap.from_dense(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), mask.tile_states(32, 32), 32, 32)
    q, k, v = inputs(1, 2, 2, 100, 100, 8)
    output, lse = cpu_attention(q, k, v, tile_map, mask, 1.0)
    assert (output == 0).all() and torch.isneginf(lse).all()
    assert all((grad == 0).all() for grad in torch.autograd.grad(output.sum(), (q, k, v)))


def test_strided_inputs():
    tensors = tuple(x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
                    for x in inputs(2, 4, 2, 130, 130, 16))  # fmt: skip
    mask = causal_mask(130, 130, CPU)
    check(tensors, random_map(mask, 2, 4, 32, 32, 0.5), mask)


def test_mask_tiles_are_shared_and_linear():
    mask = causal_mask(4096, 4096, CPU)
    tiles = lower_tiles(TileMap.dense(mask, 2, 8, 64, 64), mask)
    assert tiles.masks.shape[0] == 1  # the diagonal tiles of all heads and batch rows are alike


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("query_tile", "key_tile"), [(64, 16), (16, 48)])
def test_lowered_masks_are_the_mask(name, query_tile, key_tile):
    """Tiles that share an evaluation must see the same: every cut tile is compared with the mask itself."""
    queries, keys = 200, 230
    mask = masks(2, 4, queries, keys)[name]
    tile_map = TileMap.dense(mask, 2, 4, query_tile, key_tile)
    lowered = lower_tiles(tile_map, mask)
    allowed = mask.rows(torch.arange(queries)).expand(2, 4, -1, -1).flatten(0, 1)
    query_tiles = tile_map.shape[2]
    for row, column, cut in zip(tile_map.rows, lowered.columns, lowered.cuts, strict=True):
        head, first = int(row) // query_tiles, int(row) % query_tiles * query_tile
        wanted = allowed[head, first : first + query_tile, int(column) * key_tile : (int(column) + 1) * key_tile]
        found = lowered.masks[cut, : wanted.shape[1], : wanted.shape[0]].bool().T if cut >= 0 else torch.tensor(True)
        assert torch.equal(found.expand_as(wanted), wanted)


def operator_arguments(softcap=None):
    mask = causal_mask(70, 70, CPU)
    tile_map = random_map(mask, 1, 2, 32, 32, 0.8)
    return (*inputs(1, 2, 1, 70, 70, 8), *lower_tiles(tile_map, mask), 32, 32, 0.3, softcap, float("-inf"))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck(softcap):
    arguments = operator_arguments(softcap)
    torch.library.opcheck(tiled_forward, arguments)
    detached = [x.detach() if torch.is_tensor(x) else x for x in arguments]
    output, lse, _, skipped = tiled_forward(*detached)
    gradients = (torch.randn_like(output), torch.randn_like(lse))
    torch.library.opcheck(cpu.tiled_backward, (*gradients, *detached[:3], output, lse, skipped, *detached[3:]))


def test_compiles_without_a_graph_break():
    arguments = operator_arguments()

    def loss(q, k, v, *others):
        output, lse, _, _ = tiled_forward(q * 1.5, k, v, *others)
        return output.square().sum() + lse.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*arguments), arguments[:3]) for f in (loss, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_skip_bound_holds():
    torch.manual_seed(3)
    mask = causal_mask(600, 600, CPU)
    tile_map = random_map(mask, 1, 2, 64, 64)
    q, k, v = (x.detach() for x in inputs(1, 2, 1, 600, 600, 16))
    q *= 2
    k *= torch.tensor([1.0, 0.02]).repeat_interleave(64).repeat(5)[:600, None]  # every other tile's scores are near 0
    plain, plain_lse = cpu_attention(q, k, v, tile_map, mask, 0.5)
    off = cpu_skip_attention(q, k, v, tile_map, mask, 0.5)
    assert torch.equal(off[0], plain) and torch.equal(off[1], plain_lse) and (off[2] == 0).all()
    never = cpu_skip_attention(q, k, v, tile_map, mask, 0.5, None, -1e30)
    assert torch.equal(never[0], plain) and torch.equal(never[1], plain_lse) and (never[2] == 0).all()
    everything = mask.rows(torch.arange(600))[0, 0]
    tiles = lower_tiles(tile_map, mask)
    for threshold in (-4.0, -1.0):
        _, lse, lost, _ = cpu_skip_attention(q, k, v, tile_map, mask, 0.5, None, threshold)
        skipped = tiled_forward(q, k, v, *tiles, 64, 64, 0.5, None, threshold)[3]
        rows = torch.repeat_interleave(torch.arange(20), tiles.starts.diff())
        kept = torch.ones(20, 64 // cpu.PANEL, 10, dtype=torch.bool)
        kept[rows, :, tiles.columns] = skipped == 0
        kept = kept.view(2, -1, 10).repeat_interleave(cpu.PANEL, 1).repeat_interleave(64, 2)[:, :600, :600]
        scores = 0.5 * q.double()[0] @ k.double()[0].mT
        full, part = (
            scores.masked_fill(~seen, float("-inf")).logsumexp(-1) for seen in (everything, kept & everything)
        )
        assert torch.allclose(lse[0].double(), part, atol=1e-4)
        truth = -torch.expm1(part - full)
        assert (truth <= lost[0] * (1 + 1e-4)).all() and (truth > 0).sum() <= (lost > 0).sum()
        assert (lost <= 1).all() and skipped.any()


def test_gradients_of_skipped_attention_are_those_of_what_was_computed():
    """Tiles as large as a piece, so that the tiles left out can be read off and the map without them compared."""
    mask = full_mask(128, 256, CPU)
    tile_map = TileMap.dense(mask, 1, 1, 16, 64)
    leaves = inputs(1, 1, 1, 128, 256, 16)
    with torch.no_grad():
        leaves[1][:, :, 64:128] *= 0.01  # scores near 0 only: far below the other tiles' maxima
    arguments = (*leaves, *lower_tiles(tile_map, mask), 16, 64, 2.0, None, -3.0)
    output, lse, _, skipped = tiled_forward(*arguments)
    if cpu.PANEL > 16:
        pytest.skip("a panel holds more than one tile of 16 queries")
    kept = ~skipped.bool().view(8, 4, -1).any(-1)
    if cpu.PANEL < 16:  # a tile has several panels: compare only if they agree
        kept = ~skipped.bool().view(8, 4, -1).all(-1)
        if not torch.equal(skipped.bool().view(8, 4, -1).any(-1), ~kept):
            pytest.skip("panels of one tile differ")
    assert not kept.all()
    fewer = TileMap.from_dense((kept[None, None] * EXACT).to(torch.uint8), mask.tile_states(16, 64), 16, 64)
    same, same_lse = cpu_attention(*leaves, fewer, mask, 2.0)
    assert torch.equal(output, same) and torch.equal(lse, same_lse)
    grads = [torch.autograd.grad(o.square().sum() + log.sum(), leaves) for o, log in ((output, lse), (same, same_lse))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_float64_is_refused_with_a_remedy():
    mask = full_mask(40, 40, CPU)
    with pytest.raises(TypeError, match='backend="gather"'):
        cpu_attention(*(x.double() for x in inputs(1, 1, 1, 40, 40, 8)), TileMap.dense(mask, 1, 1, 32, 32), mask, 1.0)


@st.composite
def cases(draw):
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    lengths = draw(st.integers(1, 2)), heads * group, heads, draw(st.integers(1, 150)), draw(st.integers(1, 150))
    dims = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    tiles = draw(st.integers(16, 140)), draw(st.integers(16, 140))
    softcap = draw(st.sampled_from([None, None, 3.0]))
    return (
        lengths,
        dims,
        tiles,
        draw(st.sampled_from(MASKS)),
        draw(st.floats(0.1, 1)),
        softcap,
        draw(st.integers(0, 999)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_cases(case):
    (batch, heads, kv_heads, queries, keys), dims, tiles, name, density, softcap, seed = case
    torch.manual_seed(seed)
    mask = masks(batch, heads, queries, keys)[name]
    tensors = inputs(batch, heads, kv_heads, queries, keys, *dims)
    # gradients that all but cancel (a single key) are known to fewer digits
    check(tensors, random_map(mask, batch, heads, *tiles, density), mask, softcap=softcap, forward=2e-6, backward=1e-4)
