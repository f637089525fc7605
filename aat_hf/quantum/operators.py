"""Attention matrices as operators: which heads commute, and what coarse graining to tiles costs.

A user of attention gets, for each pair of heads of a layer, how much the order of composing them matters, and for
each head and tile size the two defects that say whether tiles may stand for their queries and for their keys. A defect
of 0 means that coarse graining commutes with attention: tile-level results are then exact.

Sources: A. Böttcher and D. Wenzel, Linear Algebra Appl. 429 (2008) 1864; J. G. Kemeny and J. L. Snell, *Finite Markov
Chains* (1960), section 6.3 (lumpability).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, real_dtype, widened
from aat_hf.quantum._tiles import tile_index


class CoarseGraining(NamedTuple):
    """Squared Frobenius norms (...), whose sum is that of the commutator with the tile average.

    queries: rows of one tile that differ after their keys are averaged; keys: what averaging the keys of a tile loses
    for the tile-averaged queries.
    """

    queries: Tensor
    keys: Tensor


def commutator(a: Tensor, b: Tensor) -> Tensor:
    """a b - b a of operators (..., n, n)."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(dtype), b.to(dtype)
    return a @ b - b @ a


def commutator_norm(a: Tensor, b: Tensor) -> Tensor:
    """||[a, b]||_F / (2 ||a||_F ||b||_F) of operators (..., n, n): (...), in [0, 1 / sqrt 2]; 0 for a zero operator.

    The upper end is the Böttcher-Wenzel bound; with the triangle inequality alone it would be 1.
    """
    dtype = common_dtype(a, b, torch.empty((), dtype=torch.float64))
    wide_a, wide_b = a.to(dtype), b.to(dtype)
    size = 2 * torch.linalg.matrix_norm(wide_a) * torch.linalg.matrix_norm(wide_b)
    defect = torch.linalg.matrix_norm(commutator(wide_a, wide_b))
    return torch.where(size > 0, defect / torch.where(size > 0, size, 1.0), 0.0).to(real_dtype(a, b))


def noncommutativity(heads: Tensor) -> Tensor:
    """`commutator_norm` of every pair of heads of a layer: (..., heads, n, n) -> (..., heads, heads), zero diagonal.

    Cost: heads^2 products of (n, n) matrices; memory of two layers of heads.
    """
    count = heads.shape[-3]
    upper = [commutator_norm(heads[..., i : i + 1, :, :], heads[..., i + 1 :, :, :]) for i in range(count - 1)]
    shape = (*heads.shape[:-3], count, count)
    i, j = torch.triu_indices(count, count, 1, device=heads.device)
    matrix = torch.zeros(shape, dtype=real_dtype(heads), device=heads.device)
    if upper:
        matrix[..., i, j] = torch.cat(upper, -1)
    return matrix + matrix.mT


def tile_average(matrix: Tensor, tile: int) -> Tensor:
    """C matrix: each row (..., n, k) replaced by the mean over its tile of rows; the last tile may be shorter."""
    rows = matrix.shape[-2]
    index = tile_index(rows, tile, matrix.device)
    sums = torch.zeros(
        (*matrix.shape[:-2], -(-rows // tile), matrix.shape[-1]), dtype=matrix.dtype, device=matrix.device
    )
    sums = sums.index_add(-2, index, matrix)
    return (sums / torch.bincount(index)[:, None])[..., index, :]


def coarse_graining(attention: Tensor, tile: int) -> CoarseGraining:
    """Split ||[A, C]||_F^2 of `attention` (..., n, n), C the average over tiles, in its query and its key side.

    ||[A, C]||^2 = ||(1 - C) A C||^2 + ||C A (1 - C)||^2: the projector C splits [A, C] into two orthogonal blocks. The
    first vanishes exactly for a strongly lumpable chain.
    """
    wide = widened(attention)
    after_keys = tile_average(wide.mT, tile).mT  # A C
    after_queries = tile_average(wide, tile)  # C A
    both = tile_average(after_keys, tile)  # C A C
    queries = (after_keys - both).abs().square().sum((-2, -1))
    keys = (after_queries - both).abs().square().sum((-2, -1))
    dtype = real_dtype(attention)
    return CoarseGraining(queries.to(dtype), keys.to(dtype))
