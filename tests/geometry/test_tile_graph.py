from __future__ import annotations

import builtins

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf.geometry.tile_graph import forman, ollivier, path_lengths, ricci_flow, tile_graph
from aat_hf.geometry.transport import wasserstein


def affinity(graph: nx.Graph) -> torch.Tensor:
    return torch.from_numpy(nx.to_numpy_array(graph))


def grid_on_a_torus(n: int) -> nx.Graph:
    return nx.grid_2d_graph(n, n, periodic=True)


EXACT = {  # graph, Ollivier curvature without idleness, Forman curvature
    "K2": (nx.complete_graph(2), 0.0, 2.0),
    "K3": (nx.complete_graph(3), 1 / 2, 3.0),
    "K6": (nx.complete_graph(6), 4 / 5, 6.0),
    "C4": (nx.cycle_graph(4), 0.0, 0.0),
    "C5": (nx.cycle_graph(5), 0.0, 0.0),
    "C9": (nx.cycle_graph(9), 0.0, 0.0),
    "grid": (grid_on_a_torus(5), 0.0, -4.0),
    "Q3": (nx.hypercube_graph(3), 0.0, -2.0),
    "Q4": (nx.hypercube_graph(4), 0.0, -4.0),
    "K33": (nx.complete_bipartite_graph(3, 3), 0.0, -2.0),
    "Petersen": (nx.petersen_graph(), -1 / 3, -2.0),
}


@pytest.mark.parametrize("name", EXACT)
def test_closed_forms(name):
    graph, by_ollivier, by_forman = EXACT[name]
    a = affinity(graph)
    for found, value in ((ollivier(a), by_ollivier), (forman(a), by_forman)):
        assert torch.allclose(found[a > 0], torch.full((1,), value, dtype=torch.float64), atol=1e-9)
        assert (found[a == 0] == 0).all()


@pytest.mark.parametrize(
    "graph", [nx.balanced_tree(3, 2), nx.path_graph(7), nx.star_graph(5), nx.random_labeled_tree(12, seed=3)]
)
def test_trees(graph):
    a = affinity(graph)
    degree = a.sum(-1)
    x, y = (a > 0).nonzero(as_tuple=True)
    expected = -2 * (1 - 1 / degree[x] - 1 / degree[y]).clamp(min=0)
    assert torch.allclose(ollivier(a)[x, y], expected, atol=1e-9)
    assert torch.allclose(forman(a)[x, y], 4 - degree[x] - degree[y], atol=1e-9)


def test_idleness_on_a_complete_graph():
    a = affinity(nx.complete_graph(5))
    found = ollivier(a, idleness=0.2)[0, 1]  # 1 / n: the walks of all nodes are alike
    assert found.item() == pytest.approx(1.0, abs=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.floats(0.2, 1.0), st.integers(0, 2**20))
def test_random_graphs(n, density, seed):
    torch.manual_seed(seed)
    weight = torch.rand(n, n, dtype=torch.float64) * (torch.rand(n, n) < density)
    a, length = tile_graph(weight), tile_graph(torch.rand(n, n)) + 0.1
    graph = nx.from_numpy_array(torch.where(a > 0, length, 0.0).numpy())
    expected = torch.full((n, n), torch.inf, dtype=torch.float64)
    for x, found in nx.all_pairs_dijkstra_path_length(graph):
        for y, d in found.items():
            expected[x, y] = d
    assert torch.allclose(path_lengths(a, length), expected)
    for curvature in (ollivier, forman):
        kappa = curvature(a, length)
        assert torch.equal(kappa, kappa.mT) and kappa.isfinite().all()
        assert torch.allclose(curvature(torch.stack([a, a]), torch.stack([length, length]))[1], kappa, atol=1e-9)
        order = torch.randperm(n)
        turned = curvature(a[order][:, order], length[order][:, order])
        assert torch.allclose(turned, kappa[order][:, order], atol=1e-8)
    assert torch.allclose(ollivier(a, 3 * length), ollivier(a, length), atol=1e-9)  # no unit of length
    assert (ollivier(a, path_lengths(a, length).nan_to_num(posinf=1.0).clamp(min=0.1)) <= 1 + 1e-9).all()


def test_weighted_forman_by_the_definition():
    a = affinity(nx.lollipop_graph(4, 2))
    length = tile_graph(torch.rand(6, 6)) + 0.2
    w = length.numpy()
    graph = nx.from_numpy_array(a.numpy())
    for x, y in graph.edges:
        total = sum(w[x, y] for _ in nx.common_neighbors(graph, x, y)) + 2 / w[x, y]
        for here, there in ((x, y), (y, x)):
            for z in set(graph[here]) - {there}:
                q = (w[x, y] * w[here, z]) ** 0.5
                total -= abs((q if graph.has_edge(there, z) else 0) - 1 / q)
        assert forman(a, length)[x, y].item() == pytest.approx(w[x, y] * total, rel=1e-12)
    assert torch.autograd.gradcheck(lambda t: forman(a, (t + t.mT) / 2 + 1), (length.requires_grad_(),))


@pytest.mark.parametrize("how", [{}, {"curvature": forman, "step": 0.05}])
def test_the_flow_finds_the_bridge(how):
    a = torch.stack([affinity(nx.barbell_graph(5, 0)), affinity(nx.complete_graph(10))])
    length = ricci_flow(a, steps=10, **how)
    assert torch.allclose(length.sum((-2, -1)), a.sum((-2, -1)))
    assert length[0].argmax() in (4 * 10 + 5, 5 * 10 + 4)
    inside = length[0][(a[0] > 0) & (length[0] < length[0].max())]
    assert length[0].max() > 2 * inside.max()
    assert torch.allclose(length[1], a[1])  # nothing to tell apart


def test_steps_that_are_too_long_are_errors():
    with pytest.raises(ValueError, match=r"below 1 / \(largest curvature\) = 0\.2"):
        ricci_flow(affinity(nx.complete_graph(5)), curvature=forman)


def test_tile_graph_is_symmetric_without_loops():
    mass = torch.tensor([[0.9, 0.0, 0.1], [0.4, 0.6, 0.0], [0.0, 0.1, 0.9]])
    assert torch.allclose(tile_graph(mass, 0.06), torch.tensor([[0, 0.2, 0], [0.2, 0, 0], [0, 0, 0]]).double())
    with pytest.raises(ValueError, match="as many query as key tiles"):
        tile_graph(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("a", "length", "message"),
    [
        (torch.ones(2, 3), None, "square"),
        (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), None, "symmetric"),
        (torch.eye(2), None, "zero diagonal"),
        (1 - torch.eye(2), torch.zeros(2, 2), "positive, finite length"),
    ],
)
def test_bad_graphs_are_errors(a, length, message):
    with pytest.raises(ValueError, match=message):
        forman(a, length)
    with pytest.raises(ValueError, match="idleness"):
        ollivier(1 - torch.eye(2), idleness=1.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**20))
def test_transport_on_a_line_is_the_area_between_the_distributions(pairs, n, seed):
    torch.manual_seed(seed)
    supply, demand = torch.softmax(2 * torch.randn(2, pairs, n, dtype=torch.float64), -1)
    place = torch.rand(n, dtype=torch.float64).sort().values
    found = wasserstein(supply, demand, (place[:, None] - place).abs()[None])
    area = ((supply - demand).cumsum(-1)[:, :-1].abs() * place.diff()).sum(-1)
    assert torch.allclose(found, area, atol=1e-9)


def test_transport_says_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="equal sums"):
        wasserstein(torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2, 2))
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match="pip install scipy"):
        wasserstein(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, 2))
