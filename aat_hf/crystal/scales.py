"""Renormalisation: attention maps and keys seen at tile sizes 1, 2, 4, ...; energy by scale, exponents, fixed points.

What a user of attention gets: at which distance a head puts its probability (`octave_mass`), how much of its keys or
map a tile size loses (`scale_energies`, `map_energies`), and an exponent that says whether halving the tiles helps:
0 the spread inside a tile does not depend on its size (no gain), 2 smooth keys (a quarter of the loss).

A renormalisation step is the average over queries and the sum over keys of each block: probabilities stay
probabilities, and two steps by a and b are one by ab. Sources: L. P. Kadanoff, Physics 2 (1966) 263 (blocks); K. G.
Wilson, Rev. Mod. Phys. 47 (1975) 773 (flows, exponents); S. Mallat, IEEE PAMI 11 (1989) 674 (energy by scale).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.crystal._groups import max_blocks, sum_groups
from aat_hf.crystal.stability import Map, jacobian
from aat_hf.quantum._precision import real_dtype, widened
from aat_hf.quantum.operators import tile_average


def coarsen(attention: Tensor, factor: int = 2, rows: Tensor | None = None) -> Tensor:
    """One renormalisation step (..., queries, keys) -> (..., ceil(queries / factor), ceil(keys / factor)).

    Args:
        attention: probabilities of keys, or masses of key tiles, for queries or query tiles.
        rows: (queries,) number of tokens each query stands for; one, or equally many, without it.
    """
    wide = widened(attention)
    weight = wide.new_ones(wide.shape[-2]) if rows is None else rows.to(wide)
    sums = sum_groups((sum_groups(wide, factor) * weight[:, None]).mT, factor).mT
    return (sums / sum_groups(weight, factor)[:, None]).to(real_dtype(attention))


def pyramid(attention: Tensor, factor: int = 2) -> list[Tensor]:
    """Attention (..., queries, keys) at tile sizes 1, factor, factor^2, ... up to a single tile.

    Raises:
        ValueError: a factor below 2.
    """
    levels, rows = [widened(attention)], attention.new_ones(attention.shape[-2])
    for _ in _tile_sizes(max(attention.shape[-2:]), factor)[1:]:
        levels.append(coarsen(levels[-1], factor, rows))
        rows = sum_groups(rows, factor)
    return [level.to(real_dtype(attention)) for level in levels]


def coarsen_map(levels: Tensor, factor: int = 2) -> Tensor:
    """Tile map for tiles `factor` times as large: each takes the finest level of detail among its parts.

    Args:
        levels: (..., query_tiles, key_tiles) bool (kept) or uint8 (`TileMap.to_dense()`).
    """
    return max_blocks(levels, factor)


def octave_mass(attention: Tensor) -> Tensor:
    """Mean probability at distance |i - j| = 0, 1, 2-3, 4-7, ...: (..., queries, keys) -> (..., octaves).

    Equal masses in all octaves (p falling as 1 / distance) are the fixed point of renormalisation: such a head looks
    alike at every scale. Queries and keys count from the same position.
    """
    queries, keys = attention.shape[-2:]
    i = torch.arange(queries, device=attention.device)[:, None]
    j = torch.arange(keys, device=attention.device)
    octave = torch.frexp((i - j).abs().double()).exponent.long().flatten()
    wide = widened(attention).flatten(-2)
    sums = wide.new_zeros((*wide.shape[:-1], int(octave.max()) + 1)).index_add(-1, octave, wide)
    return (sums / queries).to(real_dtype(attention))


def scale_energies(x: Tensor, factor: int = 2) -> Tensor:
    """Squared norm of a sequence x (..., n, d) by scale: (..., levels + 1), adding up to |x|^2.

    Entry l is |C_h x - C_h' x|^2 with tile sizes h = factor^l and h' = factor^(l+1), C_h the average over tiles (the
    Haar wavelet energies); the last entry is that of the mean. Tiles of size h lose the sum of the first ln h / ln
    factor entries.
    """
    return _energies([tile_average(widened(x), h) for h in _tile_sizes(x.shape[-2], factor)], real_dtype(x))


def map_energies(attention: Tensor, factor: int = 2) -> Tensor:
    """Squared Frobenius norm of maps (..., queries, keys) by scale, averaging queries and keys: (..., levels + 1)."""
    wide = widened(attention)
    sizes = _tile_sizes(max(attention.shape[-2:]), factor)
    return _energies([tile_average(tile_average(wide, h).mT, h).mT for h in sizes], real_dtype(attention))


def tile_variance(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Mean squared distance of the entries of x (..., n, d) to the mean of their tile: (..., len(sizes)).

    It is the trace of the tile's Fisher metric (`geometry.fisher.tile_metric`), averaged over tokens. For one
    coordinate and full tiles: white noise var (1 - 1/h), a random walk (h^2 - 1) / (6 h), a ramp (h^2 - 1) / 12.
    """
    wide = widened(x)
    spread = [(wide - tile_average(wide, h)).square().sum(-1).mean(-1) for h in sizes]
    return torch.stack(spread, -1).to(real_dtype(x))


def beta_function(variance: Tensor, sizes: Sequence[int]) -> Tensor:
    """d ln variance / d ln h between neighbouring tile sizes: (..., s) -> (..., s - 1).

    0 at a fixed point of the flow; variances must be positive (h = 1 has none).
    """
    return variance.log().diff(dim=-1) / _log_sizes(variance, sizes).diff()


def scaling_exponent(variance: Tensor, sizes: Sequence[int]) -> Tensor:
    """Slope of ln variance on ln h by least squares: (..., s) -> (...); twice the Hurst exponent of the keys."""
    x, y = _log_sizes(variance, sizes), variance.log()
    x = x - x.mean()
    return (y * x).sum(-1) / x.square().sum()


def fixed_point(transform: Map, start: Tensor, iterations: int = 50) -> Tensor:
    """Solution of transform(x) = x from `start` (..., n) by Newton's method: (..., n).

    Args:
        transform: from (n,) to (n,), e.g. a renormalisation of couplings.

    Raises:
        RuntimeError: no convergence.
    """
    identity = torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)
    apply = torch.func.vmap(transform)
    x, bound = start, 64 * torch.finfo(start.dtype).eps
    for _ in range(iterations):
        gap = apply(x.reshape(-1, x.shape[-1])).reshape(x.shape) - x
        step: Tensor = torch.linalg.solve(identity - jacobian(transform, x), gap)
        x = x + step
        if bool((step.norm(dim=-1) <= bound * x.norm(dim=-1).clamp(min=1)).all()):
            return x
    raise RuntimeError(f"no fixed point within {iterations} Newton steps: choose a start closer to it")


def scaling_dimensions(transform: Map, point: Tensor, factor: float) -> Tensor:
    """ln |eigenvalue| / ln factor of the linearised step by `factor` at a fixed point (..., n): (..., n), descending.

    Positive: relevant, a deviation grows with the scale; negative: irrelevant, coarse graining forgets it.
    """
    moduli = torch.linalg.eigvals(jacobian(transform, point)).abs()
    return (moduli.log() / math.log(factor)).sort(-1, descending=True).values


def _tile_sizes(length: int, factor: int) -> list[int]:
    """1, factor, ... up to the first that covers `length`."""
    if factor < 2:
        raise ValueError(f"a coarse-graining factor is at least 2, got {factor}")
    sizes = [1]
    while sizes[-1] < length:
        sizes.append(sizes[-1] * factor)
    return sizes


def _energies(averages: list[Tensor], dtype: torch.dtype) -> Tensor:
    details = [fine - coarse for fine, coarse in itertools.pairwise(averages)]
    return torch.stack([part.square().sum((-2, -1)) for part in [*details, averages[-1]]], -1).to(dtype)


def _log_sizes(variance: Tensor, sizes: Sequence[int]) -> Tensor:
    return torch.tensor(sizes, dtype=variance.dtype, device=variance.device).log()
