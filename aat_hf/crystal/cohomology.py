"""Scale cohomology: the holes of the tile complex at every scale, and which of them survive coarse graining.

What a user of attention gets: how many separate blocks a head's map has (Betti number 0), how many loops of tiles that
attend round a gap (Betti number 1), which of both are still there with tiles twice as large, and the part of a flow
between tiles that comes from an importance score (`hodge_parts`).

Definition. K_l is the clique complex of the graph of tiles of size 2^l, d_k: C^k(K_l) -> C^(k+1)(K_l) its coboundary on
real cochains and H^k(K_l) = ker d_k / im d_(k-1). Tile -> tile // 2 is a simplicial map f_l: K_l -> K_(l+1), which
pulls cochains back, x -> x o f_l, and commutes with d. The *scale cohomology* of a map is the sequence of spaces and
pullbacks H^k(K_0) <- H^k(K_1) <- ...; its numbers are the ranks r_k(l, m) of H^k(K_m) -> H^k(K_l), with r_k(l, l) the
Betti number. It is a tower, not a filtration. Sources: L.-H. Lim, *Hodge Laplacians on graphs*, SIAM Review 62 (2020)
685; H. Edelsbrunner and J. Harer (2010), chapter VII; X. Jiang et al., Math. Program. 127 (2011) 203 (HodgeRank).

Matrices are dense: meant for up to a few thousand simplices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.crystal.complexes import Complex, chain_map, clique_complex, coarse_graph, coboundary
from aat_hf.quantum._precision import real_dtype, widened


class HodgeParts(NamedTuple):
    """Orthogonal parts (..., count(k)) of a cochain, adding up to it.

    gradient: d of a (k - 1)-cochain; curl: transposed d of a (k + 1)-cochain; harmonic: neither, one dimension a hole.
    """

    gradient: Tensor
    curl: Tensor
    harmonic: Tensor


def hodge_laplacian(space: Complex, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """d_k' d_k + d_(k-1) d_(k-1)': (count(k), count(k)); its kernel is H^k."""
    up = coboundary(space, k, dtype)
    laplacian = up.mT @ up
    if k > 0:
        down = coboundary(space, k - 1, dtype)
        laplacian = laplacian + down @ down.mT
    return laplacian


def betti(space: Complex, k: int) -> int:
    """Dimension of H^k over the reals (torsion does not count): count(k) - rank d_k - rank d_(k-1).

    For k = `space.dimension` of a truncated clique complex it is too large: build one dimension more.
    """
    below = _rank(coboundary(space, k - 1)) if k > 0 else 0
    return space.count(k) - _rank(coboundary(space, k)) - below


def harmonic_basis(space: Complex, k: int) -> Tensor:
    """Orthonormal basis of the kernel of the Hodge Laplacian: (count(k), betti(k)) float64."""
    holes = betti(space, k)
    return torch.linalg.eigh(hodge_laplacian(space, k)).eigenvectors[:, :holes]


def hodge_parts(space: Complex, cochain: Tensor, k: int) -> HodgeParts:
    """Hodge decomposition of k-cochains (..., count(k)).

    For k = 1 and a flow on edges (for example the log ratio of the masses in both directions), the gradient part is the
    difference of a score of tiles; curl and harmonic parts are cycles that no score explains.
    """
    wide = widened(cochain)
    gradient = _projected(wide, coboundary(space, k - 1)) if k > 0 else torch.zeros_like(wide)
    curl = _projected(wide, coboundary(space, k).mT)
    parts = (gradient, curl, wide - gradient - curl)
    return HodgeParts(*(part.to(real_dtype(cochain)) for part in parts))


def induced_rank(source: Complex, target: Complex, vertices: Tensor, k: int) -> int:
    """Rank of the map H_k(source) -> H_k(target) of a map of vertices, equal to that of the pullback on H^k.

    Harmonic chains represent the classes; a cycle of the target bounds when its harmonic part is 0.

    Raises:
        ValueError: the map of vertices is not simplicial.
    """
    start, end = harmonic_basis(source, k), harmonic_basis(target, k)
    return _rank(end.mT @ chain_map(source, target, vertices, k) @ start)


def tower(graph: Tensor, levels: int, dimension: int = 2) -> list[Complex]:
    """Clique complexes of a graph of tiles (n, n) bool and of its coarse graphs by 2, 4, ...: `levels` complexes."""
    spaces = []
    for _ in range(levels):
        spaces.append(clique_complex(graph, dimension))
        graph = coarse_graph(graph)
    return spaces


def scale_ranks(spaces: list[Complex], k: int) -> Tensor:
    """Ranks r_k(l, m) between the levels of a `tower`: (levels, levels) int64, Betti numbers on the diagonal.

    Entry (l, m), l < m: holes of level l that are still holes of level m; entries below the diagonal are 0.
    """
    levels = len(spaces)
    ranks = torch.zeros((levels, levels), dtype=torch.int64)
    for low in range(levels):
        ranks[low, low] = betti(spaces[low], k)
        for high in range(low + 1, levels):
            vertices = torch.arange(spaces[low].count(0), device=spaces[low].simplices[0].device) // 2 ** (high - low)
            ranks[low, high] = induced_rank(spaces[low], spaces[high], vertices, k)
    return ranks


def _rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix, rtol=1e-9)) if matrix.numel() else 0


def _projected(x: Tensor, columns: Tensor) -> Tensor:
    """Orthogonal projection of x (..., n) onto the span of `columns` (n, m)."""
    if not columns.numel():
        return torch.zeros_like(x)
    left, values, _ = torch.linalg.svd(columns, full_matrices=False)
    left = left[:, values > 1e-9 * values.max()]
    return (x @ left) @ left.mT
