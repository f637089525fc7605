from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_states import REAL, attention, batches, dtypes, few, gaussian, seeds, tolerance

from aat_hf.quantum import operators

SX = torch.tensor([[0.0, 1], [1, 0]])
SZ = torch.tensor([[1.0, 0], [0, -1]])


def average(n, tile):
    """The projector C onto vectors that are constant on tiles, as a matrix."""
    index = torch.arange(n) // tile
    same = (index[:, None] == index).double()
    return same / same.sum(-1, keepdim=True)


@few
@given(batches, st.integers(1, 6), dtypes, seeds)
def test_commutator_norm(batch, n, dtype, seed):
    a, b = gaussian((*batch, n, n), dtype, seed), gaussian((n, n), dtype, seed + 1)
    value = operators.commutator_norm(a, b)
    assert value.dtype == dtype.to_real() and value.shape == batch
    assert (value >= 0).all() and (value <= 0.5**0.5 + 1e-6).all()
    torch.testing.assert_close(operators.commutator(a, b), a @ b - b @ a)
    torch.testing.assert_close(operators.commutator_norm(b, 7 * a), value)
    assert operators.commutator_norm(a, a @ a).max() <= tolerance(dtype, 1e-6, 1e-14)


def test_commutator_norm_of_pauli_matrices_reaches_the_bound_and_of_zero_is_zero():
    assert float(operators.commutator_norm(SX, SZ)) == pytest.approx(0.5**0.5, rel=1e-6)
    zero = torch.zeros(2, 2, requires_grad=True)
    value = operators.commutator_norm(zero, SZ)
    value.backward()
    assert value == 0 and zero.grad is not None and zero.grad.isfinite().all()


@few
@given(batches, st.integers(1, 5), st.integers(1, 6), st.sampled_from(REAL), seeds)
def test_noncommutativity_of_a_layer(batch, heads, n, dtype, seed):
    layer = attention((*batch, heads, n, n), seed).to(dtype)
    matrix = operators.noncommutativity(layer)
    assert matrix.shape == (*batch, heads, heads) and matrix.dtype == dtype
    for i in range(heads):
        for j in range(heads):
            a, b = layer[..., i, :, :].double(), layer[..., j, :, :].double()
            size = a.square().sum((-2, -1)).sqrt() * b.square().sum((-2, -1)).sqrt()
            expected = (a @ b - b @ a).square().sum((-2, -1)).sqrt() / (2 * size)
            torch.testing.assert_close(matrix[..., i, j].double(), expected, rtol=0, atol=tolerance(dtype, 1e-6, 1e-14))
    order = torch.randperm(heads)
    torch.testing.assert_close(operators.noncommutativity(layer[..., order, :, :]), matrix[..., order, :][..., order])


def test_heads_that_share_closed_blocks_commute_with_them():
    """Packed documents: attention inside two blocks commutes with the projectors onto the blocks, and only then."""
    inside = torch.diag((torch.arange(7) < 3).double())
    packed = torch.block_diag(attention((3, 3), 0), attention((4, 4), 1))
    assert operators.commutator_norm(packed, inside) == 0
    assert operators.commutator_norm(attention((7, 7), 2), inside) > 0.01


@few
@given(batches, st.integers(1, 11), st.integers(1, 5), st.sampled_from(REAL), seeds)
def test_defects_of_coarse_graining_split_the_commutator(batch, n, tile, dtype, seed):
    a, c = attention((*batch, n, n), seed).to(dtype), average(n, tile)
    found = operators.coarse_graining(a, tile)
    one, wide = torch.eye(n, dtype=torch.float64), a.double()
    atol = tolerance(dtype, 1e-5, 1e-12)
    for value, term in ((found.queries, (one - c) @ wide @ c), (found.keys, c @ wide @ (one - c))):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), term.square().sum((-2, -1)), rtol=0, atol=atol)
    whole = (wide @ c - c @ wide).square().sum((-2, -1))
    torch.testing.assert_close((found.queries + found.keys).double(), whole, rtol=0, atol=atol)
    torch.testing.assert_close(operators.tile_average(wide, tile), c @ wide)


def test_lumpable_chain_has_no_query_defect_and_a_coarse_one_none_at_all():
    """Rows of one tile put equal mass on every tile, though on different keys in it."""
    n, tile = 8, 2
    coarse = attention((4, 4), 0)
    inner = torch.softmax(gaussian((n, 4, tile), torch.float64, 1), -1)
    lumpable = (coarse.repeat_interleave(tile, 0)[..., None] * inner).reshape(n, n)
    found = operators.coarse_graining(lumpable, tile)
    assert found.queries <= 1e-30 and found.keys > 1e-3
    flat = coarse.repeat_interleave(tile, 0).repeat_interleave(tile, 1) / tile
    found = operators.coarse_graining(flat, tile)
    assert found.queries <= 1e-30 and found.keys <= 1e-30


def test_gradients():
    layer = attention((3, 4, 4), 0).requires_grad_()
    assert torch.autograd.gradcheck(operators.noncommutativity, (layer,))
    assert torch.autograd.gradcheck(lambda a: operators.coarse_graining(a, 3), (layer,))
    (gradient,) = torch.autograd.grad(operators.commutator_norm(layer, layer.detach()).sum(), layer)
    assert gradient.isfinite().all()
