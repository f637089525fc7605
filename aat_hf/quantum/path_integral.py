"""Path sums: how tokens, or tiles, reach each other through the layers of a model.

A user of attention gets attention rollout and its generalisation: the weight with which every earlier token reaches
every later one over all paths, the single best path, and everything between the two by a temperature. On tile maps the
same sums cost tiles^2 instead of tokens^2, and their column means rank the keys worth keeping across layers.

Sources: S. Abnar and W. Zuidema, *Quantifying Attention Flow in Transformers*, ACL (2020); R. P. Feynman and A. R.
Hibbs, *Quantum Mechanics and Path Integrals* (1965), section 10.2; M. Suzuki, Commun. Math. Phys. 51 (1976) 183.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, real_dtype, widened
from aat_hf.quantum._tiles import tile_index


def path_sum(layers: Sequence[Tensor]) -> Tensor:
    """A_L ... A_1: entry (i, j) is the sum over token paths from i down to j of the product of their weights.

    Args:
        layers: transfer matrices (..., n_l, n_{l-1}) from the first layer to the last, e.g. attention (..., n, n).

    Returns:
        (..., n_L, n_0); rows add up to 1 when those of every layer do.

    Raises:
        ValueError: no layer.
    """
    if not layers:
        raise ValueError("a path sum needs at least one layer")
    total = widened(layers[0])
    for layer in layers[1:]:
        total = widened(layer) @ total
    return total.to(common_dtype(*layers))


def rollout(attention: Tensor, residual: float | Tensor = 0.5) -> Tensor:
    """Attention rollout, the path sum of residual 1 + (1 - residual) (mean over heads): (..., n, n).

    Args:
        attention: (layers, ..., heads, n, n), row stochastic.
        residual: weight of the skip connection in [0, 1]; a tensor (layers,) gives each layer its own.
    """
    identity = torch.eye(attention.shape[-1], dtype=torch.float64, device=attention.device)
    weight = torch.as_tensor(residual, dtype=torch.float64, device=attention.device).expand(attention.shape[0])
    mean = attention.mean(-3, dtype=torch.float64)
    layers = [w * identity + (1 - w) * layer for w, layer in zip(weight, mean, strict=True)]
    return path_sum(layers).to(real_dtype(attention))


def tile_transfer(attention: Tensor, tile: int) -> Tensor:
    """Transfer matrix between tiles, the mean over a query tile of the mass on a key tile: (..., n, n) -> (..., t, t).

    Path sums of it equal the tile transfer of the path sum exactly when every layer is lumpable
    (`operators.coarse_graining` with `queries` = 0); rows add up to 1 when those of `attention` do.
    """
    index = tile_index(attention.shape[-1], tile, attention.device)
    size = torch.bincount(index).to(torch.float64)
    wide = widened(attention)
    tiles = len(size)
    masses = wide.new_zeros((*wide.shape[:-1], tiles)).index_add(-1, index, wide)
    sums = wide.new_zeros((*wide.shape[:-2], tiles, tiles)).index_add(-2, index, masses)
    return (sums / size[:, None]).to(common_dtype(attention))


def kept_transfer(transfer: Tensor, kept: Tensor) -> Tensor:
    """`transfer` (..., t, t) restricted to the pairs a tile map keeps, rows renormalised to their former sums.

    Args:
        kept: (..., t, t) bool, e.g. `tile_map.exact` of square tiles.

    A row that keeps nothing of its weight becomes 0: no path leads through it.
    """
    masked = torch.where(kept, transfer, 0.0)
    sums = masked.sum(-1, keepdim=True)
    return masked * (transfer.sum(-1, keepdim=True) / torch.where(sums == 0, 1.0, sums))


def soft_path_sum(log_layers: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
    """Path sum in the semiring of T log-sum-exp(. / T), on log weights: T = 1 is log `path_sum`, T = 0 the best path.

    Args:
        log_layers: (..., n_l, n_{l-1}) from the first layer to the last, finite or -inf.
        temperature: T >= 0. The value at T lies above that at 0 by at most T (L - 1) ln n.

    Returns:
        (..., n_L, n_0). Memory: n^3 numbers per product, meant for tiles or short texts.

    Raises:
        ValueError: no layer or a negative temperature.
    """
    if not log_layers or not temperature >= 0:
        raise ValueError(f"a path sum needs a layer and a temperature >= 0: {len(log_layers)} layers, T={temperature}")
    total = widened(log_layers[0])
    for layer in log_layers[1:]:
        joined = widened(layer)[..., :, :, None] + total[..., None, :, :]
        total = joined.amax(-2) if temperature == 0 else temperature * _logsumexp(joined / temperature)
    return total.to(common_dtype(*log_layers))


def best_path(log_layers: Sequence[Tensor], end: int, start: int) -> tuple[list[int], float]:
    """The path of largest weight from position `end` after the last layer to `start` before the first (Viterbi).

    Args:
        log_layers: (n_l, n_{l-1}) log weights from the first layer to the last.

    Returns:
        Positions from `end` to `start`, one more than layers, and the log weight of the path.
    """
    scores = [widened(log_layers[0])[:, start]]
    choices = []
    for layer in log_layers[1:]:
        best = (widened(layer) + scores[-1]).max(-1)
        scores.append(best.values)
        choices.append(best.indices)
    path = [end]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, start], float(scores[-1][end])


def heat_step(
    points: Tensor,
    sources: Tensor,
    step: float,
    potential: Tensor | None = None,
    source_potential: Tensor | None = None,
) -> Tensor:
    """Log of one imaginary-time slice, -|x - y|^2 / (2 step) - step V(x) / 2 - step U(y) / 2: (..., n, m).

    Args:
        points, sources: (..., n, d) and (..., m, d).
        step: imaginary time of the slice, > 0, in units of mass / hbar.
        potential, source_potential: V (..., n) and U (..., m); absent is 0.

    With `step` = 1, queries as points, keys as sources and U = -|k|^2, its softmax over sources is dot-product
    attention, because |q|^2 shifts whole rows: one layer is one step of a particle in imaginary time. With V = U it is
    the symmetric (Strang) Trotter slice; `slice_weights` turns that into a transfer matrix on a grid.
    """
    # Differences, not |x|^2 + |y|^2 - 2 x y, which cancels for near points far from the origin.
    exponent = -(points[..., :, None, :] - sources[..., None, :, :]).square().sum(-1) / (2 * step)
    if potential is not None:
        exponent = exponent - step * potential[..., :, None] / 2
    return exponent if source_potential is None else exponent - step * source_potential[..., None, :] / 2


def slice_weights(grid: Tensor, potential: Tensor, step: float) -> Tensor:
    """Transfer matrix of exp(-step (p^2 / 2 + V)) on a uniform 1-D `grid` (n,), `potential` (..., n): (..., n, n).

    Strang splitting: exp(-step V / 2) heat(step) exp(-step V / 2), each sum over the grid an integral.
    """
    spacing = grid[1] - grid[0]
    log = heat_step(grid[:, None], grid[:, None], step, potential, potential)
    return log.exp() * spacing / math.sqrt(2 * math.pi * step)


def partition_function(transfer: Tensor, slices: int) -> Tensor:
    """tr(transfer^slices), the sum over closed paths: (..., n, n) -> (...)."""
    power = torch.linalg.matrix_power(widened(transfer), slices)
    return power.diagonal(dim1=-2, dim2=-1).sum(-1).to(common_dtype(transfer))


def _logsumexp(joined: Tensor) -> Tensor:
    """Log-sum-exp over dimension -2, -inf (without NaN gradients) where everything is -inf."""
    highest = joined.detach().amax(-2, keepdim=True)
    shift = torch.where(highest == float("-inf"), 0.0, highest)
    sums = torch.exp(joined - shift).sum(-2)
    dead = sums == 0
    return torch.where(dead, -torch.inf, torch.where(dead, 1.0, sums).log() + shift[..., 0, :])
