from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import REAL, attention, batches, few, gaussian, seeds, tolerance

from aat_hf.quantum import operators
from aat_hf.quantum import path_integral as paths
from aat_hf.tiling.masks import FULL
from aat_hf.tiling.tile_map import COARSE, CULLED, EXACT, TileMap


def all_paths(layers):
    """Every token path (position after the last layer, ..., position before the first) and its steps' entries."""
    n, depth = layers[0].shape[-1], len(layers)
    for path in itertools.product(range(n), repeat=depth + 1):
        steps = [float(layer[i, j]) for layer, i, j in zip(reversed(layers), path, path[1:], strict=False)]
        yield path, steps


@few
@given(st.integers(1, 4), st.integers(1, 4), seeds)
def test_path_sum_is_the_sum_over_paths(n, depth, seed):
    layers = list(attention((depth, n, n), seed))
    expected = torch.zeros(n, n, dtype=torch.float64)
    for path, weights in all_paths(layers):
        expected[path[0], path[-1]] += math.prod(weights)
    found = paths.path_sum(layers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.sum(-1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-14)
    single = paths.path_sum([layer.float() for layer in layers])
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(paths.soft_path_sum([layer.log() for layer in layers]).exp(), found)


def test_path_sum_of_layers_of_different_sizes_and_of_none():
    layers = [torch.rand(2, 4, 3), torch.rand(2, 5, 4)]
    torch.testing.assert_close(paths.path_sum(layers), layers[1] @ layers[0])
    with pytest.raises(ValueError, match="at least one layer"):
        paths.path_sum([])
    for bad in (([], 1.0), (layers, -1.0), (layers, math.nan)):
        with pytest.raises(ValueError, match="temperature >= 0"):
            paths.soft_path_sum(*bad)


@few
@given(batches, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), seeds)
def test_rollout_is_the_path_sum_with_skip_connections(batch, depth, heads, n, seed):
    a = attention((depth, *batch, heads, n, n), seed).float()
    r = paths.rollout(a, 0.5)
    expected = torch.eye(n).expand(*batch, n, n)
    for layer in a:
        mixed = 0.5 * torch.eye(n) + 0.5 * layer.mean(-3)
        expected = mixed @ expected
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(r.sum(-1), torch.ones(*batch, n))
    torch.testing.assert_close(paths.rollout(a, 0.0), paths.path_sum(list(a.mean(-3))))
    torch.testing.assert_close(paths.rollout(a, torch.full((depth,), 0.5)), r)
    torch.testing.assert_close(paths.rollout(a, 1.0), torch.eye(n).expand(*batch, n, n))


def test_causal_attention_stays_causal():
    a = torch.softmax(
        gaussian((3, 2, 6, 6), torch.float64, 0).masked_fill(~torch.ones(6, 6).tril().bool(), -torch.inf), -1
    )
    r = paths.rollout(a)
    assert not r.triu(1).any() and (r.tril() > 0).sum() == 21


def lumpable(n, tile, seed):
    count = n // tile
    coarse = attention((count, count), seed)
    inner = torch.softmax(gaussian((n, count, tile), torch.float64, seed + 1), -1)
    return (coarse.repeat_interleave(tile, 0)[..., None] * inner).reshape(n, n)


def test_tile_transfer_is_exact_for_lumpable_layers():
    layers = [lumpable(12, 3, seed) for seed in (0, 2, 4)]
    whole = paths.tile_transfer(paths.path_sum(layers), 3)
    by_tiles = paths.path_sum([paths.tile_transfer(layer, 3) for layer in layers])
    torch.testing.assert_close(by_tiles, whole, rtol=0, atol=1e-15)
    ragged = attention((2, 7, 7), 6)
    transfer = paths.tile_transfer(ragged, 3)
    assert float(transfer[1, 2, 0]) == pytest.approx(float(ragged[1, 6, :3].sum()))
    assert float(transfer[0, 0, 1]) == pytest.approx(float(ragged[0, :3, 3:6].sum(-1).mean()))
    torch.testing.assert_close(transfer.sum(-1), torch.ones(2, 3, dtype=torch.float64))


@few
@given(st.integers(2, 4), st.integers(2, 4), st.integers(1, 4), seeds)
def test_error_of_tile_transfers_is_bounded_by_commutators(count, tile, depth, seed):
    """||C A_L ... A_1 C - C A_L C ... C A_1 C|| <= sum_l ||[A_l, C]|| prod of the other norms, in the 2-norm."""
    n = count * tile
    layers = list(attention((depth, n, n), seed, 1.0))
    index = torch.arange(n) // tile
    average = (index[:, None] == index).double() / tile
    whole = average @ paths.path_sum(layers) @ average
    tiled = paths.path_sum([paths.tile_transfer(layer, tile) for layer in layers])
    spread = tiled[index][:, index] / tile  # as an operator on tokens
    norms = [torch.linalg.matrix_norm(layer, 2) for layer in layers]
    defects = [operators.coarse_graining(layer, tile) for layer in layers]
    bound = sum((d.queries + d.keys).sqrt() * math.prod(norms[:i] + norms[i + 1 :]) for i, d in enumerate(defects))
    assert torch.linalg.matrix_norm(whole - spread, 2) <= bound + 1e-12


def test_path_sums_on_tile_maps():
    levels = torch.tensor([[EXACT, CULLED, CULLED], [EXACT, EXACT, CULLED], [CULLED, COARSE, EXACT]], dtype=torch.uint8)
    states = torch.full((1, 1, 3, 3), FULL, dtype=torch.uint8)
    tile_map = TileMap.from_dense(levels[None, None], states, 4, 4)
    transfer = paths.tile_transfer(attention((1, 1, 12, 12), 0), 4)
    kept = paths.kept_transfer(transfer, tile_map.exact)
    assert not kept[~tile_map.exact].any()
    torch.testing.assert_close(kept.sum(-1), transfer.sum(-1))
    assert float(kept[0, 0, 2, 2]) == pytest.approx(1)
    assert float(kept[0, 0, 1, 0] / kept[0, 0, 1, 1]) == pytest.approx(
        float(transfer[0, 0, 1, 0] / transfer[0, 0, 1, 1])
    )
    reach = paths.path_sum([kept, kept])
    assert reach[0, 0, 0].tolist() == pytest.approx([1, 0, 0])
    assert reach[0, 0, 2].tolist() == pytest.approx([0, 0, 1])
    torch.testing.assert_close(paths.kept_transfer(transfer, torch.ones(3, 3, dtype=torch.bool)), transfer)
    assert not paths.kept_transfer(transfer, torch.zeros(3, 3, dtype=torch.bool)).any()


@few
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from(REAL), seeds)
def test_best_path_and_the_tropical_limit(n, depth, dtype, seed):
    """Against every path, on the same log weights; sums are held to a few roundings of what they add up."""
    layers = list(attention((depth, n, n), seed))
    logs = [layer.log().to(dtype) for layer in layers]
    eps = tolerance(dtype, 1e-6, 1e-14)
    tropical = paths.soft_path_sum(logs, 0.0)
    assert tropical.dtype == dtype
    every = {path: math.fsum(steps) for path, steps in all_paths(logs)}
    for end, start in itertools.product(range(n), repeat=2):
        best = max((path for path in every if path[0] == end and path[-1] == start), key=every.__getitem__)
        assert float(tropical[end, start]) == pytest.approx(every[best], rel=eps, abs=eps)
        path, log_weight = paths.best_path(logs, end, start)
        assert log_weight == pytest.approx(every[best], rel=eps, abs=eps)
        assert tuple(path) == best
    for temperature in (1.0, 0.1, 1e-3):
        soft = paths.soft_path_sum(logs, temperature)
        slack = eps * (1 + tropical.abs())
        assert (soft >= tropical - slack).all()
        assert (soft <= tropical + temperature * (depth - 1) * math.log(n) + slack).all()


def test_log_paths_through_forbidden_pairs():
    """Causal layers: nothing reaches a later token; log weights of -1000 are no underflow; gradients stay finite."""
    scores = (1000 * gaussian((2, 5, 5), torch.float64, 0)).masked_fill(~torch.ones(5, 5).tril().bool(), -torch.inf)
    layers = [x.requires_grad_() for x in torch.log_softmax(scores, -1).unbind(0)]
    for temperature in (0.0, 0.5, 1.0):
        total = paths.soft_path_sum(layers, temperature)
        allowed = torch.ones(5, 5).tril().bool()
        assert (total[~allowed] == -torch.inf).all() and total[allowed].isfinite().all()
        gradients = torch.autograd.grad(total[allowed].sum(), layers)
        assert all(g.isfinite().all() for g in gradients)
        assert float(gradients[1].sum()) == pytest.approx(15)  # each of the 15 sums uses one step of the last layer


def test_attention_is_one_step_of_imaginary_time():
    """|q|^2 shifts whole rows, which softmax ignores: what is left is the heat kernel with the potential -|k|^2."""
    q, k = gaussian((2, 5, 8), torch.float64, 0), gaussian((2, 7, 8), torch.float64, 1)
    step = paths.heat_step(q, k, 1.0, source_potential=-k.square().sum(-1))
    torch.testing.assert_close(torch.softmax(step, -1), torch.softmax(q @ k.mT, -1))


def oscillator(points, extent, omega, step):
    grid = torch.linspace(-extent, extent, points, dtype=torch.float64)
    return grid, paths.slice_weights(grid, omega**2 * grid**2 / 2, step)


@pytest.mark.parametrize(("slices", "omega", "beta"), [(8, 1.0, 2.0), (16, 1.3, 2.0), (64, 0.7, 5.0)])
def test_oscillator_has_the_exact_partition_function_of_the_lattice(slices, omega, beta):
    """Strang slices of step e give 1 / (2 sinh(beta w' / 2)) with w' = (2 / e) asinh(w e / 2), to rounding."""
    step = beta / slices
    _, transfer = oscillator(500, 12.0, omega, step)
    lattice = 2 / step * math.asinh(omega * step / 2)
    z = float(paths.partition_function(transfer, slices))
    assert z == pytest.approx(1 / (2 * math.sinh(beta * lattice / 2)), rel=1e-12)


def test_trotter_error_of_the_oscillator_is_of_second_order():
    beta, omega = 2.0, 1.3
    exact = 1 / (2 * math.sinh(beta * omega / 2))
    errors = []
    for slices in (8, 16, 32):
        _, transfer = oscillator(500, 9.0, omega, beta / slices)
        errors.append(float(paths.partition_function(transfer, slices)) - exact)
    assert all(3.8 < a / b < 4.2 for a, b in itertools.pairwise(errors))


def test_ground_state_of_the_oscillator():
    """A long imaginary time leaves the Gaussian ground state: Feynman and Kac."""
    grid, transfer = oscillator(400, 8.0, 1.0, 0.02)
    ground = torch.linalg.matrix_power(transfer, 1024) @ torch.ones_like(grid)
    ground = ground / ground.square().sum().sqrt()
    expected = torch.exp(-(grid**2) / 2)
    torch.testing.assert_close(ground, expected / expected.square().sum().sqrt(), rtol=0, atol=2e-5)


def test_gradients():
    layers = tuple(x.requires_grad_() for x in attention((3, 3, 3), 0).unbind(0))
    assert torch.autograd.gradcheck(lambda *a: paths.path_sum(a), layers)
    assert torch.autograd.gradcheck(lambda *a: paths.soft_path_sum([x.log() for x in a], 0.7), layers)
    heads = attention((2, 2, 3, 3), 1).requires_grad_()
    residual = torch.tensor([0.3, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(paths.rollout, (heads, residual))
    assert torch.autograd.gradcheck(lambda a: paths.tile_transfer(a, 2), (heads,))
    kept = torch.ones(3, 3).tril().bool()
    assert torch.autograd.gradcheck(lambda a: paths.kept_transfer(a, kept), (heads,))
