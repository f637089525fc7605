"""Tiles as a space: the clique complex of the graph of tiles that attend to each other, and maps between scales.

What a user of attention gets: the blocks a map falls into (`components`: packed documents, sections), the weights at
which they merge (`merge_weights`), and the complex whose holes `cohomology` counts.
The graph of a map of tile masses is `geometry.tile_graph.tile_graph(mass, threshold) > 0`.

Source: H. Edelsbrunner and J. Harer, *Computational Topology* (2010), chapters III and VII.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aat_hf.crystal._groups import max_blocks


@dataclass(frozen=True)
class Complex:
    """A simplicial complex.

    Attributes:
        simplices: for k = 0, 1, ... the k-simplices (count, k + 1) int64: ascending vertices, in lexicographic order.
    """

    simplices: tuple[Tensor, ...]

    @property
    def dimension(self) -> int:
        """The largest k with room for simplices."""
        return len(self.simplices) - 1

    def count(self, k: int) -> int:
        """Number of k-simplices, 0 for any other k."""
        return len(self.simplices[k]) if 0 <= k <= self.dimension else 0


def coarse_graph(graph: Tensor, factor: int = 2) -> Tensor:
    """Coarse tiles are joined when any of their parts are: bool (..., n, n) -> (..., ceil(n / factor), same).

    With it, tile -> tile // factor maps cliques onto cliques, so that it is a map of clique complexes.
    """
    joined = max_blocks(graph, factor)
    return joined & ~torch.eye(joined.shape[-1], dtype=torch.bool, device=graph.device)


def clique_complex(graph: Tensor, dimension: int = 2) -> Complex:
    """All cliques of up to `dimension` + 1 vertices of a graph (n, n) bool; symmetric, the diagonal is not looked at.

    Betti numbers up to `dimension` - 1 are those of the whole clique complex.
    """
    n = graph.shape[-1]
    vertex = torch.arange(n, device=graph.device)
    simplices = [vertex[:, None]]
    for _ in range(dimension):
        last = simplices[-1]
        common = graph[last].all(1) & (vertex > last[:, -1:])  # (count, n): joined to every vertex so far
        row, new = common.nonzero(as_tuple=True)
        simplices.append(torch.cat([last[row], new[:, None]], 1))
    return Complex(tuple(simplices))


def coboundary(space: Complex, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrix of the coboundary of k-cochains, entries 0 and +-1: (count(k + 1), count(k)).

    (d x)(v0 ... vk+1) = sum_i (-1)^i x(all but vi); the transpose is the boundary of (k + 1)-chains. Products of
    consecutive ones vanish exactly: the entries are small integers.
    """
    matrix = torch.zeros((space.count(k + 1), space.count(k)), dtype=dtype, device=space.simplices[0].device)
    if matrix.numel():
        cells = space.simplices[k + 1]
        row = torch.arange(len(cells), device=cells.device)
        for i in range(k + 2):
            face = torch.cat([cells[:, :i], cells[:, i + 1 :]], 1)
            matrix[row, _position(face, space, k)] = (-1.0) ** i
    return matrix


def chain_map(source: Complex, target: Complex, vertices: Tensor, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Matrix of the map of k-chains that a map of vertices induces: (target.count(k), source.count(k)).

    A simplex two of whose vertices meet goes to 0; others take the sign of the permutation that sorts their image. It
    commutes with the boundary exactly. Its transpose pulls cochains back.

    Args:
        vertices: (source vertices,) int64, image of each; `torch.arange(n) // factor` between scales.

    Raises:
        ValueError: the image of a simplex is missing in the target.
    """
    matrix = torch.zeros((target.count(k), source.count(k)), dtype=dtype, device=vertices.device)
    if not source.count(k):
        return matrix
    image = vertices[source.simplices[k]]
    ordered, order = image.sort(-1)
    alive = (ordered.diff(dim=-1) != 0).all(-1)
    column = alive.nonzero()[:, 0]
    if len(column):
        row = _position(ordered[column], target, k)
        matrix[row, column] = _sign(order[column]).to(dtype)
    return matrix


def components(graph: Tensor) -> Tensor:
    """The smallest vertex of the component of every vertex of graphs (..., n, n) bool: (..., n) int64.

    Labels spread to neighbours and jump to the label of their label until nothing changes: about log n rounds.
    """
    n = graph.shape[-1]
    vertex = torch.arange(n, device=graph.device)
    near = graph | graph.mT | torch.eye(n, dtype=torch.bool, device=graph.device)
    label = vertex.expand(graph.shape[:-1])
    while True:
        lower = torch.where(near, label[..., None, :], n).amin(-1)
        lower = lower.gather(-1, lower)
        if torch.equal(lower, label):
            return label
        label = lower


def merge_weights(weight: Tensor) -> Tensor:
    """Edge weights of a maximum spanning tree, descending: symmetric (..., n, n) -> (..., n - 1).

    Lowering a threshold on the weights merges two blocks at each of these values: the persistence of components (single
    linkage). A change of the weights by at most e moves none of them by more than e. Prim's method, n steps of O(n).
    """
    n = weight.shape[-1]
    best, inside = weight[..., 0, :], torch.zeros(weight.shape[:-1], dtype=torch.bool, device=weight.device)
    inside[..., 0] = True
    merged = []
    for _ in range(n - 1):
        top, vertex = best.masked_fill(inside, -torch.inf).max(-1, keepdim=True)
        merged.append(top)
        inside = inside.scatter(-1, vertex, True)
        row = weight.gather(-2, vertex[..., None].expand(*vertex.shape[:-1], 1, n))[..., 0, :]
        best = torch.maximum(best, row)
    if not merged:
        return weight.new_zeros((*weight.shape[:-2], 0))
    return torch.cat(merged, -1).sort(-1, descending=True).values


def _position(cells: Tensor, space: Complex, k: int) -> Tensor:
    """Index of each of `cells` (count, k + 1) among the k-simplices; ValueError if one is missing."""
    known = space.simplices[k] if k <= space.dimension else cells[:0]
    both, label = torch.cat([known, cells]).unique(dim=0, return_inverse=True)
    position = torch.full((len(both),), -1, device=cells.device)
    position[label[: len(known)]] = torch.arange(len(known), device=cells.device)
    found = position[label[len(known) :]]
    if bool((found < 0).any()):
        missing = cells[found < 0][0].tolist()
        raise ValueError(f"simplex {missing} is not in the complex: the map of vertices is not simplicial")
    return found


def _sign(order: Tensor) -> Tensor:
    """Sign of permutations (count, k): -1 to the number of inversions."""
    i, j = torch.triu_indices(order.shape[-1], order.shape[-1], 1, device=order.device)
    inversions = (order[:, i] > order[:, j]).sum(-1)
    return 1 - 2 * (inversions % 2)
