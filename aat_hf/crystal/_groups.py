"""Sums and maxima over groups of neighbours; the last group may be shorter.

What a user of attention gets: the same ragged tiles in every module, at no copy of the data when nothing is ragged.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def split_groups(x: Tensor, size: int) -> Tensor:
    """Groups of `size` along the last dimension, the end padded with zeros: (..., n) -> (..., groups, size).

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a group has at least one member, got size {size}")
    missing = -x.shape[-1] % size
    return (pad(x, (0, missing)) if missing else x).unflatten(-1, (-1, size))


def sum_groups(x: Tensor, size: int) -> Tensor:
    """Sum over each group of the last dimension: (..., n) -> (..., ceil(n / size))."""
    return split_groups(x, size).sum(-1)


def sum_blocks(x: Tensor, size: int) -> Tensor:
    """Sum over (size, size) blocks of matrices: (..., m, n) -> (..., ceil(m / size), ceil(n / size))."""
    return sum_groups(sum_groups(x, size).mT, size).mT


def max_blocks(x: Tensor, size: int) -> Tensor:
    """Maximum over (size, size) blocks of matrices without negative entries, also booleans: shapes as `sum_blocks`."""
    return split_groups(split_groups(x, size).amax(-1).mT, size).amax(-1).mT
