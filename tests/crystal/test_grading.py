from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.sparse
import torch
from crystal_inputs import batches, dtypes, few, gaussian, seeds, uniform, within
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import spsolve

from aat_hf.crystal import grading


def grid_laplacian(shape):
    """Of a grid graph, from its edges."""
    nodes = np.arange(np.prod(shape)).reshape(shape)
    laplacian = scipy.sparse.lil_matrix((nodes.size, nodes.size))
    for dim in range(len(shape)):
        near = zip(np.delete(nodes, -1, dim).ravel(), np.delete(nodes, 0, dim).ravel(), strict=True)
        for a, b in near:
            laplacian[a, a] += 1
            laplacian[b, b] += 1
            laplacian[a, b] -= 1
            laplacian[b, a] -= 1
    return laplacian.tocsc()


@few
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([torch.uint8, torch.int64, torch.float32]), seeds)
def test_grade_is_the_largest_graded_map_below(rows, columns, dtype, seed):
    levels = (9 * uniform(rows, columns, seed=seed)).floor().to(dtype)
    found = grading.grade(levels, (0, 1))
    expected = torch.tensor(
        [[min(levels[a, b].item() + abs(a - i) + abs(b - j) for a in range(rows) for b in range(columns))
          for j in range(columns)] for i in range(rows)], dtype=dtype)  # fmt: skip
    assert torch.equal(found, expected)
    assert grading.is_graded(found, (0, 1)) and (found <= levels).all()
    assert torch.equal(grading.grade(found, (0, 1)), found)
    assert grading.is_graded(levels, (0, 1)) == torch.equal(found, levels)


def test_one_fine_tile_makes_a_staircase():
    levels = torch.tensor([5, 5, 5, 5, 0, 5, 5], dtype=torch.uint8)
    assert grading.grade(levels).tolist() == [4, 3, 2, 1, 0, 1, 2]
    assert not grading.is_graded(levels)
    assert grading.grade(levels.expand(3, 2, 7)).shape == (3, 2, 7)


@few
@given(st.integers(1, 20), st.floats(0.1, 10), dtypes, seeds)
def test_levels_of_equal_information(n, information, dtype, seed):
    index = uniform(n, seed=seed, dtype=dtype) * 4
    index[0] = 0
    levels = grading.levels_of_equal_information(index, information, 6)
    assert levels[0] == 6 and levels.min() >= 0 and levels.max() <= 6
    held = index.double() * 2.0**levels
    inner = (levels > 0) & (levels < 6)
    assert (held[levels > 0] <= information * 1.0001).all() and (2 * held[inner] > information * 0.9999).all()


@few
@given(batches, st.integers(1, 8), st.integers(1, 5), st.floats(0, 100), dtypes, seeds)
def test_smoothed_solves_the_equation_of_scipy(batch, rows, columns, strength, dtype, seed):
    field = gaussian(*batch, rows, columns, seed=seed, dtype=dtype)
    atol = within(dtype, 1e-5, 1e-11)
    for shape, dims in (((rows, columns), (-2, -1)), ((columns,), (-1,)), ((rows,), (-2,))):
        found = grading.smoothed(field, strength, dims)
        matrix = (scipy.sparse.identity(int(np.prod(shape))) + strength * grid_laplacian(shape)).tocsc()
        flat = field.double().movedim(dims, tuple(range(-len(dims), 0))).reshape(-1, int(np.prod(shape)))
        expected = np.stack([np.atleast_1d(spsolve(matrix, line)) for line in flat.numpy()])
        solved = found.double().movedim(dims, tuple(range(-len(dims), 0))).reshape(flat.shape)
        torch.testing.assert_close(solved, torch.from_numpy(expected), rtol=0, atol=atol)
        torch.testing.assert_close(solved.sum(-1), flat.sum(-1), rtol=0, atol=10 * atol)
        assert solved.max() <= flat.max() + atol and solved.min() >= flat.min() - atol

        def roughness(x, shape=shape):
            return torch.from_numpy(((grid_laplacian(shape) @ x.numpy().T).T * x.numpy()).sum(-1))

        assert (roughness(solved) <= roughness(flat) + 30 * atol).all()


def test_smoothing_is_symmetric():
    a, b = gaussian(4, 5), gaussian(4, 5, seed=1)
    left, right = ((grading.smoothed(x, 2.0, (0, 1)) * y).sum() for x, y in itertools.permutations((a, b)))
    torch.testing.assert_close(left, right)
    with pytest.raises(ValueError, match="strength"):
        grading.smoothed(a, -1.0)


def test_gradients():
    field = gaussian(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: grading.smoothed(x, 0.7, (0, 1)), (field,))
    assert torch.autograd.gradcheck(lambda x: grading.grade(3 * x, (0, 1)), (field,))
