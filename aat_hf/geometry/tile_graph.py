"""Curvature and Ricci flow of graphs of tiles, after Ollivier and after Forman.

What a user of attention gets: which tiles form blocks. Edges inside a block of tiles that attend to each other are
positively curved, bridges between blocks negatively; under the flow bridges grow long, and cutting the long edges
leaves the blocks (packed documents, sections, files).

A graph is its symmetric affinity (..., n, n), 0 for no edge, with zero diagonal; batches go through together. Lengths
(..., n, n) of the edges are 1 unless given. Results are float64 and 0 where there is no edge.

Sources: Y. Ollivier, J. Funct. Anal. 256 (2009) 810; J. Jost and S. Liu, Discrete Comput. Geom. 51 (2014) 300;
R. Forman, Discrete Comput. Geom. 29 (2003) 323; A. Samal et al., Sci. Rep. 8 (2018) 8650; C.-C. Ni et al., Sci. Rep. 9
(2019) 9984.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aat_hf.geometry.transport import wasserstein


class Curvature(Protocol):
    """`ollivier`, `forman`, or a function like them."""

    def __call__(self, affinity: Tensor, length: Tensor | None = None) -> Tensor:
        """Curvature of the edges of graphs (..., n, n), symmetric, 0 where there is no edge."""
        ...


def tile_graph(mass: Tensor, threshold: float = 0.0) -> Tensor:
    """Affinity of the graph on tiles: symmetrised `mass` (..., n, n) where it is above `threshold`: (..., n, n).

    Raises:
        ValueError: not square: query and key tiles must be the same tiles.
    """
    if mass.ndim < 2 or mass.shape[-1] != mass.shape[-2]:
        raise ValueError(f"a graph of tiles needs as many query as key tiles, got {tuple(mass.shape)}")
    both = (mass.double() + mass.double().mT) / 2
    off = ~torch.eye(mass.shape[-1], dtype=torch.bool, device=mass.device)
    return torch.where((both > threshold) & off, both, 0.0)


def path_lengths(affinity: Tensor, length: Tensor | None = None) -> Tensor:
    """Lengths of the shortest paths (Floyd and Warshall): (..., n, n), inf between components. O(n^3)."""
    edge, length = _checked(affinity, length)
    far = torch.where(edge, length, float("inf"))
    far.diagonal(dim1=-2, dim2=-1).zero_()
    for k in range(affinity.shape[-1]):
        far = torch.minimum(far, far[..., :, k, None] + far[..., None, k, :])
    return far


def ollivier(affinity: Tensor, length: Tensor | None = None, idleness: float = 0.0) -> Tensor:
    """Ollivier curvature 1 - W1(m_x, m_y) / d(x, y) of every edge: (..., n, n).

    m_x stays at x with probability `idleness` and else takes an edge with probability proportional to its affinity.
    Cost: one exact optimal transport, O(degree^3), for each edge; no gradient.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: an idleness outside [0, 1), or no graph.
    """
    if not 0 <= idleness < 1:
        raise ValueError(f"idleness = {idleness}: must be in [0, 1)")
    far = path_lengths(affinity, length).flatten(0, -3) if affinity.ndim > 2 else path_lengths(affinity, length)[None]
    weight = affinity.double().reshape(far.shape)
    degree = weight.sum(-1, keepdim=True)
    walk = (1 - idleness) * weight / torch.where(degree > 0, degree, 1.0)
    walk = walk + idleness * torch.eye(walk.shape[-1], dtype=walk.dtype, device=walk.device)
    graph, x, y = torch.triu(weight, 1).nonzero(as_tuple=True)
    curvature = torch.zeros_like(weight)
    for g in range(len(weight)):
        i, j = x[graph == g], y[graph == g]
        kappa = 1 - wasserstein(walk[g, i], walk[g, j], far[g : g + 1]) / far[g, i, j]
        curvature[g, i, j] = curvature[g, j, i] = kappa
    return curvature.reshape(affinity.shape)


def forman(affinity: Tensor, length: Tensor | None = None) -> Tensor:
    """Forman curvature of every edge, triangles being faces: (..., n, n); differentiable. O(n^3).

    For lengths 1 it is 4 - deg x - deg y + 3 (triangles of the edge). In general, with w the length of the edge, w_z
    that of an edge beside it at x or y, and q = sqrt(w w_z):
    w (w (triangles) + 2 / w - sum_z |[z closes a triangle] q - 1 / q|).
    """
    edge, length = _checked(affinity, length)
    w = torch.where(edge, length, 1.0)
    q = (w[..., :, :, None] * w[..., :, None, :]).sqrt()  # [x, y, z]: edges (x, y) and (x, z)
    closes = edge[..., None, :, :].to(w)  # y and z are neighbours
    beside = torch.where(edge[..., :, None, :], (closes * q - 1 / q).abs(), 0.0).sum(-1) - 1 / w  # less z = y
    triangles = edge.to(w) @ edge.to(w)
    return torch.where(edge, w * (w * triangles + 2 / w - (beside + beside.mT)), 0.0)


def ricci_flow(
    affinity: Tensor,
    length: Tensor | None = None,
    *,
    curvature: Curvature = ollivier,
    steps: int = 15,
    step: float = 1.0,
) -> Tensor:
    """Lengths of the edges after `steps` of length <- (1 - step * curvature) d, the total kept: (..., n, n).

    d is the shortest path along the edge. Ollivier curvature is at most 1, and steps up to 1 are safe without
    idleness; for others the step must stay below 1 / (largest curvature).

    Raises:
        ValueError: a step that would give an edge no length; the message names the longest that would not.
    """
    edge, length = _checked(affinity, length)
    length = torch.where(edge, length, 0.0)
    total = length.sum((-2, -1), keepdim=True)
    for _ in range(steps):
        kappa = curvature(affinity, length)
        highest = float(kappa.max()) if kappa.numel() else 0.0
        if not step * highest < 1:
            raise ValueError(f"step = {step}: must be below 1 / (largest curvature) = {1 / highest:.4g}")
        length = torch.where(edge, (1 - step * kappa) * path_lengths(affinity, length), 0.0)
        length = length * total / length.sum((-2, -1), keepdim=True).clamp(min=torch.finfo(length.dtype).tiny)
    return length


def _checked(affinity: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where edges are, and their lengths in float64.

    Raises:
        ValueError: not symmetric, negative, with loops, or with an edge without length.
    """
    if affinity.ndim < 2 or affinity.shape[-1] != affinity.shape[-2]:
        raise ValueError(f"the affinity of a graph is square, not {tuple(affinity.shape)}")
    edge = affinity > 0
    loops = affinity.diagonal(dim1=-2, dim2=-1)
    if not torch.equal(affinity, affinity.mT) or bool((affinity < 0).any()) or bool(loops.any()):
        raise ValueError("the affinity of a graph must be symmetric and not negative, with a zero diagonal")
    length = torch.ones_like(affinity, dtype=torch.float64) if length is None else length.double()
    if not bool(torch.where(edge, length.isfinite() & (length > 0), True).all()):
        raise ValueError("every edge needs a positive, finite length")
    return edge, length
