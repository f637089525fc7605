from __future__ import annotations

import networkx as nx
import numpy as np
import pytest
import sympy
import torch
from crystal_inputs import batches, cycle, dtypes, few, gaussian, random_graph, seeds, uniform, within
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from aat_hf.crystal import cohomology, complexes
from aat_hf.geometry.tile_graph import tile_graph

graphs = st.tuples(st.integers(1, 9), st.floats(0.1, 0.9), seeds)


def octahedron():
    """The sphere: every vertex joined to all but its opposite."""
    return ~torch.eye(6, dtype=torch.bool) & ~torch.eye(6, dtype=torch.bool).flip(0)


def torus():
    """Flag triangulation of the torus: the 5 x 5 grid on a ring in both directions, with one diagonal."""
    graph = torch.zeros(25, 25, dtype=torch.bool)
    for i in range(5):
        for j in range(5):
            for di, dj in ((0, 1), (1, 0), (1, 1)):
                graph[5 * i + j, 5 * ((i + di) % 5) + (j + dj) % 5] = True
    return graph | graph.mT


def exact_betti(space, k):
    """Over the rationals, in exact arithmetic."""
    ranks = [sympy.Matrix(complexes.coboundary(space, i).long().tolist()).rank() if i >= 0 and space.count(i + 1) else 0
             for i in (k - 1, k)]  # fmt: skip
    return space.count(k) - sum(ranks)


@few
@given(graphs)
def test_cliques_are_those_of_networkx(graph):
    adjacency = random_graph(*graph)
    space = complexes.clique_complex(adjacency, 3)
    found = [tuple(s) for cells in space.simplices for s in cells.tolist()]
    cliques = nx.enumerate_all_cliques(nx.from_numpy_array(adjacency.numpy()))
    assert sorted(found) == sorted(tuple(sorted(c)) for c in cliques if len(c) <= 4)
    assert all(cells.tolist() == sorted(cells.tolist()) for cells in space.simplices)


@few
@given(graphs, dtypes)
def test_coboundary_of_a_coboundary_is_exactly_zero(graph, dtype):
    space = complexes.clique_complex(random_graph(*graph), 3)
    for k in range(2):
        product = complexes.coboundary(space, k + 1, dtype) @ complexes.coboundary(space, k, dtype)
        assert product.dtype == dtype and torch.equal(product, torch.zeros_like(product))


def test_coboundary_of_a_triangle():
    space = complexes.clique_complex(~torch.eye(3, dtype=torch.bool))
    assert complexes.coboundary(space, 0).tolist() == [[-1, 1, 0], [-1, 0, 1], [0, -1, 1]]
    assert complexes.coboundary(space, 1).tolist() == [[1, -1, 1]]


@pytest.mark.parametrize(
    "graph, expected",
    [
        (torch.zeros(3, 3, dtype=torch.bool), [3, 0, 0]),
        (~torch.eye(4, dtype=torch.bool), [1, 0, 0]),
        (cycle(7), [1, 1, 0]),
        (torch.block_diag(cycle(4), cycle(5)), [2, 2, 0]),
        (octahedron(), [1, 0, 1]),
        (torus(), [1, 2, 1]),
    ],
    ids=["points", "simplex", "circle", "two circles", "sphere", "torus"],
)
def test_betti_numbers_of_known_spaces(graph, expected):
    space = complexes.clique_complex(graph.bool(), 3)
    assert [cohomology.betti(space, k) for k in range(3)] == expected
    for k in range(3):
        values = torch.linalg.eigvalsh(cohomology.hodge_laplacian(space, k)) if space.count(k) else torch.ones(0)
        assert int((values < 1e-9).sum()) == expected[k] == cohomology.harmonic_basis(space, k).shape[1]


@settings(few, max_examples=10)
@given(graphs)
def test_betti_numbers_of_random_complexes_and_their_euler_characteristic(graph):
    space = complexes.clique_complex(random_graph(*graph), 8)
    found = [cohomology.betti(space, k) for k in range(9)]
    assert found[:3] == [exact_betti(space, k) for k in range(3)]
    assert sum((-1) ** k * b for k, b in enumerate(found)) == sum((-1) ** k * space.count(k) for k in range(9))


def test_betti_numbers_of_gudhi():
    gudhi = pytest.importorskip("gudhi")
    for seed in range(10):
        graph = random_graph(14, 0.4, seed)
        tree = gudhi.SimplexTree.create_from_array(np.where(graph, 1.0, 9.0) - np.eye(14) * 9, max_filtration=2.0)
        tree.expansion(4)
        tree.compute_persistence(persistence_dim_max=True)
        space = complexes.clique_complex(graph, 4)
        assert [cohomology.betti(space, k) for k in range(3)] == [*tree.betti_numbers(), 0, 0][:3]


@few
@given(graphs, batches, dtypes)
def test_hodge_parts(graph, batch, dtype):
    space = complexes.clique_complex(random_graph(*graph), 2)
    x = gaussian(*batch, space.count(1), seed=graph[2], dtype=dtype)
    parts = cohomology.hodge_parts(space, x, 1)
    atol = within(dtype, 1e-5, 1e-10)
    torch.testing.assert_close(sum(parts), x, rtol=0, atol=atol)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert ((parts[a] * parts[b]).sum(-1).abs() <= 30 * atol).all()
    laplacian = cohomology.hodge_laplacian(space, 1, dtype)
    assert ((parts.harmonic @ laplacian).abs() <= 30 * atol).all()
    score = gaussian(*batch, space.count(0), seed=graph[2] + 1, dtype=dtype)
    flow = score @ complexes.coboundary(space, 0, dtype).mT
    torch.testing.assert_close(cohomology.hodge_parts(space, flow, 1).gradient, flow, rtol=0, atol=atol)
    assert (cohomology.hodge_parts(space, score, 0).gradient == 0).all()


def test_a_flow_round_a_circle_is_harmonic():
    space = complexes.clique_complex(cycle(6))
    around = torch.tensor([-1.0 if edge == [0, 5] else 1.0 for edge in space.simplices[1].tolist()])
    parts = cohomology.hodge_parts(space, around, 1)
    torch.testing.assert_close(parts.harmonic, around)


@settings(few, max_examples=10)
@given(graphs, st.integers(2, 3), dtypes)
def test_maps_between_scales_commute_with_the_boundary_exactly(graph, factor, dtype):
    fine = random_graph(*graph)
    coarse = complexes.coarse_graph(fine, factor)
    source, target = complexes.clique_complex(fine, 3), complexes.clique_complex(coarse, 3)
    vertices = torch.arange(len(fine)) // factor
    maps = [complexes.chain_map(source, target, vertices, k, dtype) for k in range(3)]
    for k in range(2):
        down, below = (complexes.coboundary(s, k, dtype).mT for s in (source, target))
        assert torch.equal(maps[k] @ down, below @ maps[k + 1])
    for k in range(2):  # functorial: two steps are one
        twice = complexes.clique_complex(complexes.coarse_graph(coarse, factor), 3)
        step = complexes.chain_map(target, twice, torch.arange(len(coarse)) // factor, k, dtype)
        assert torch.equal(step @ maps[k], complexes.chain_map(source, twice, vertices // factor, k, dtype))


def test_a_map_that_turns_an_edge_round_has_a_sign_and_one_that_is_not_simplicial_is_refused():
    edge = complexes.clique_complex(cycle(3), 1)
    flip = complexes.chain_map(edge, edge, torch.tensor([2, 1, 0]), 1)
    assert flip.tolist() == [[0, 0, -1], [0, -1, 0], [-1, 0, 0]]
    points = complexes.clique_complex(torch.zeros(3, 3, dtype=torch.bool), 1)
    with pytest.raises(ValueError, match="not simplicial"):
        complexes.chain_map(edge, points, torch.arange(3), 1)


def test_a_coarse_circle_is_still_a_circle_until_it_is_too_small():
    spaces = cohomology.tower(cycle(16), 4)
    assert [space.count(0) for space in spaces] == [16, 8, 4, 2]
    assert cohomology.scale_ranks(spaces, 1).tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert cohomology.scale_ranks(spaces, 0).tolist() == [[1] * (4 - 0)] + [[0] * i + [1] * (4 - i) for i in (1, 2, 3)]


def test_only_the_larger_of_two_circles_survives():
    spaces = cohomology.tower(torch.block_diag(cycle(4), torch.zeros(4, 4), cycle(16)).bool(), 2)
    ranks = cohomology.scale_ranks(spaces, 1)
    assert ranks.tolist() == [[2, 1], [0, 1]]


@few
@given(batches, st.integers(1, 12), st.floats(0, 0.4), seeds)
def test_components_of_scipy(batch, n, chance, seed):
    graphs = torch.stack([random_graph(n, chance, seed + i) for i in range(int(np.prod(batch)))])
    found = complexes.components(graphs.unflatten(0, (*batch, 1)).squeeze(len(batch)))
    assert found.shape == (*batch, n)
    for graph, label in zip(graphs, found.reshape(-1, n), strict=True):
        count, expected = connected_components(graph.numpy(), directed=False)
        assert len(label.unique()) == count == cohomology.betti(complexes.clique_complex(graph, 1), 0)
        assert torch.equal(label[:, None] == label, torch.from_numpy(expected[:, None] == expected))
        assert (label[label] == label).all() and (label <= torch.arange(n)).all()


def test_packed_documents_are_components():
    mass = torch.block_diag(*[torch.ones(n, n).tril() for n in (3, 1, 4)])
    label = complexes.components(tile_graph(mass) > 0)
    assert label.tolist() == [0, 0, 0, 3, 4, 4, 4, 4]
    path = torch.diag(torch.ones(999), 1)
    assert (complexes.components(tile_graph(path) > 0) == 0).all()


@few
@given(batches, st.integers(1, 10), dtypes, seeds)
def test_merge_weights_of_scipy_and_their_stability(batch, n, dtype, seed):
    w = uniform(*batch, n, n, seed=seed, dtype=dtype) + 1
    w = w + w.mT
    found = complexes.merge_weights(w)
    assert found.shape == (*batch, n - 1) and found.dtype == dtype
    for one, merged in zip(
        w.flatten(0, -3) if batch else w[None], found.flatten(0, -2) if batch else found[None], strict=True
    ):
        tree = minimum_spanning_tree(np.triu(10 - one.double().numpy(), 1))
        expected = np.sort(10 - tree.data)[::-1].copy()
        torch.testing.assert_close(merged.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)
    noise = 0.1 * uniform(*batch, n, n, seed=seed + 1, dtype=dtype)
    noise = noise + noise.mT
    moved = complexes.merge_weights(w + noise) - found
    assert not moved.numel() or moved.abs().max() <= noise.abs().max() + 1e-6


def test_gradients():
    w = uniform(5, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: complexes.merge_weights(w + w.mT), (w,))
    space = complexes.clique_complex(random_graph(6, 0.6, 1), 2)
    x = gaussian(space.count(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cohomology.hodge_parts(space, x, 1), (x,))
