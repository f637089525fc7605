"""Random inputs and the Hypothesis strategies of these tests."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

# On a busy machine a single example may take long; the examples themselves are few.
few = settings(max_examples=20, deadline=None)
precisions = [torch.float32, torch.float64]
dtypes = st.sampled_from(precisions)
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)
seeds = st.integers(0, 2**31)


def within(dtype: torch.dtype, single: float, double: float) -> float:
    return single if dtype == torch.float32 else double


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def uniform(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def attention(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.softmax(3 * gaussian(*shape, seed=seed), -1).to(dtype)


def random_graph(n: int, chance: float, seed: int) -> Tensor:
    """Symmetric bool (n, n), no loops."""
    upper = (uniform(n, n, seed=seed) < chance).triu(1)
    return upper | upper.mT


def cycle(n: int) -> Tensor:
    """The circle as a graph of n vertices."""
    step = torch.roll(torch.eye(n, dtype=torch.bool), 1, 1)
    return step | step.mT
