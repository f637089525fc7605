"""Random states and operators for the tests, and the Hypothesis strategies over their shapes and precisions."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

REAL = [torch.float32, torch.float64]
COMPLEX = [torch.complex64, torch.complex128]
# On a busy machine a single example may take long; the examples themselves are few.
few = settings(max_examples=20, deadline=None)

dtypes = st.sampled_from(REAL + COMPLEX)
batches = st.lists(st.integers(1, 3), max_size=2).map(tuple)
seeds = st.integers(0, 2**31)


def tolerance(dtype: torch.dtype, single: float, double: float) -> float:
    return single if dtype.to_real() == torch.float32 else double


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=generator(seed))


def state(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    x = gaussian(shape, dtype, seed)
    return x / x.norm(dim=-1, keepdim=True)


def density(shape: tuple[int, ...], rank: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Density matrices (*shape, n, n) -- `shape` ends in n -- of the given rank."""
    x = gaussian((*shape, rank), dtype.to_complex() if dtype.is_complex else dtype, seed)
    rho = x @ x.mH
    return rho / rho.diagonal(dim1=-2, dim2=-1).sum(-1).real[..., None, None]


def hermitian(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    x = gaussian((*shape, shape[-1]), dtype, seed)
    return x + x.mH


def unitary(n: int, seed: int, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.linalg.qr(gaussian((*batch, n, n), torch.complex128, seed)).Q


def attention(shape: tuple[int, ...], seed: int, sharpness: float = 3.0) -> Tensor:
    """Row-stochastic matrices (*shape, n): softmax of Gaussian scores."""
    return torch.softmax(sharpness * gaussian(shape, torch.float64, seed), -1)
