"""Entropies of density matrices: how many different attention maps a head, or a pair of heads, really has.

A user of attention gets the effective rank e^S of a head: 1 when all rows attend alike, so that one tile map serves
them all, up to min(queries, keys) when no two rows share a key. Mutual information says what a joint state shares.
All values are in nats; 0 log 0 is 0 and every gradient is finite, also at rank-deficient and degenerate matrices.

Cost: all but the purity solve eigenvalue problems of the matrix they are given, n^3. A mixture of m < n states needs no
(n, n) matrix: `ensemble_entropy` takes the states, everything of one matrix takes their `states.gram_matrix` (m, m).

Sources: Nielsen and Chuang (2000), chapter 11; O. Roy and M. Vetterli, *The effective rank*, EUSIPCO (2007).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.quantum._precision import components, real_dtype, widened
from aat_hf.quantum._spectral import hermitian, log_psd, noise_floor
from aat_hf.quantum.states import density_matrix, from_probabilities, gram_matrix, partial_trace


def von_neumann(rho: Tensor) -> Tensor:
    """-tr(rho ln rho) of `rho` (..., n, n), divided by its trace: (...), nats in [0, ln n].

    The gradient is -(ln rho + S) on the support of rho and 0 on its kernel, where the true one is infinite.
    """
    return _shannon(_spectrum(rho)).to(real_dtype(rho))


def effective_rank(rho: Tensor) -> Tensor:
    """e^S of `rho` (..., n, n): (...), in [1, n]."""
    return von_neumann(rho).exp()


def ensemble_entropy(states: Tensor, weights: Tensor | None = None) -> Tensor:
    """`von_neumann` of the mixture of pure `states` (..., m, n), from the smaller of its two spectra: (...), nats.

    It is also the Holevo quantity of the ensemble. Weights are as in `states.density_matrix`. NaN if all are zero.
    """
    wide = widened(states)
    smaller = gram_matrix if states.shape[-2] < states.shape[-1] else density_matrix
    return _shannon(_spectrum(smaller(wide, weights))).to(real_dtype(states))


def head_entropy(attention: Tensor) -> Tensor:
    """`ensemble_entropy` of the rows of heads, `attention` (..., queries, keys): (...), nats.

    Cost: one Gram matrix and one eigenvalue problem of size min(queries, keys) for each head.
    """
    return ensemble_entropy(from_probabilities(widened(attention))).to(real_dtype(attention))


def renyi(rho: Tensor, order: float) -> Tensor:
    """ln(tr rho^a) / (1 - a) of `rho` (..., n, n), divided by its trace, at order a >= 0: (...), nats.

    a = 0 is the log of the rank, a = 1 `von_neumann`, a = inf -ln of the largest eigenvalue. Eigenvalues that rounding
    cannot tell from 0 count as 0 at orders below 1, where small eigenvalues weigh most.

    Raises:
        ValueError: a negative order.
    """
    if not order >= 0:
        raise ValueError(f"the order of a Renyi entropy is not negative: {order}")
    values = _spectrum(rho, cut=order < 1)
    if order == 1:
        entropy = _shannon(values)
    elif order == float("inf"):
        entropy = -values.amax(-1).log()
    else:
        entropy = _log_moment(values, order) / (1 - order)
    return entropy.to(real_dtype(rho))


def purity(rho: Tensor) -> Tensor:
    """tr(rho^2) of a Hermitian `rho` (..., n, n), without eigenvalues: (...), in [1 / n, 1] at trace 1."""
    return components(widened(rho)).square().sum((-2, -1)).to(real_dtype(rho))


def relative_entropy(rho: Tensor, sigma: Tensor) -> Tensor:
    """tr rho (ln rho - ln sigma) of density matrices (..., n, n), each divided by its trace: (...), nats, >= 0.

    +inf where rho has weight outside the support of sigma, as far as rounding can tell them apart.
    """
    rho_trace, sigma_trace = _real_trace(rho), _real_trace(sigma)
    cross = (hermitian(rho).conj() * log_psd(sigma)).sum((-2, -1)).real / rho_trace
    value = sigma_trace.log() - cross - _shannon(_spectrum(rho))
    leaked = _weight_in_kernel(rho, sigma) > rho.shape[-1] * (noise_floor(rho) / rho_trace + noise_floor(sigma))
    # Klein's inequality: the true value is not negative, so that max(., 0) can only move towards it.
    return torch.where(leaked, torch.inf, value.clamp(min=0.0)).to(real_dtype(rho, sigma))


def mutual_information(rho: Tensor, dims: Sequence[int]) -> Tensor:
    """S(A) + S(B) - S(AB) of `rho` (..., n, n) on two subsystems of dimensions `dims`: (...), nats, >= 0.

    Raises:
        ValueError: `dims` are not two numbers whose product is n.
    """
    if len(dims) != 2:
        raise ValueError(f"mutual information is between two subsystems, not {len(dims)}")
    wide = widened(rho)
    parts = _shannon(_spectrum(partial_trace(wide, dims, (0,)))) + _shannon(_spectrum(partial_trace(wide, dims, (1,))))
    # Subadditivity: the true value is not negative, so that max(., 0) can only move towards it.
    return (parts - _shannon(_spectrum(wide))).clamp(min=0.0).to(real_dtype(rho))


def _real_trace(matrix: Tensor) -> Tensor:
    return widened(matrix).diagonal(dim1=-2, dim2=-1).sum(-1).real


def _spectrum(rho: Tensor, cut: bool = False) -> Tensor:
    """Eigenvalues of `rho` over their sum (..., n), >= 0; with `cut`, 0 up to the noise floor."""
    values = torch.linalg.eigvalsh(hermitian(rho))
    # A density matrix is positive semidefinite: a negative eigenvalue is rounding, and 0 is nearer to the true one.
    values = torch.where(values > (noise_floor(rho)[..., None] if cut else 0.0), values, 0.0)
    return values / values.sum(-1, keepdim=True)


def _shannon(values: Tensor) -> Tensor:
    inside = torch.where(values > 0, values, 1.0)  # ln 1 = 0: value and gradient vanish where the eigenvalue does
    return -(inside * inside.log()).sum(-1)


def _log_moment(values: Tensor, order: float) -> Tensor:
    """ln sum values^order, with full relative accuracy near order 1, where it vanishes."""
    positive = values > 0
    log = torch.where(positive, values, 1.0).log()
    if abs(order - 1) < 0.5:
        return torch.log1p((values * torch.expm1((order - 1) * log)).sum(-1))
    return torch.logsumexp(torch.where(positive, order * log, -torch.inf), -1)


def _weight_in_kernel(rho: Tensor, sigma: Tensor) -> Tensor:
    """Probability that a measurement of rho finds the kernel of sigma: (...), a constant for derivatives."""
    levels, vectors = torch.linalg.eigh(hermitian(sigma.detach()))
    rho = hermitian(rho.detach())
    dtype = torch.promote_types(rho.dtype, vectors.dtype)
    vectors = vectors.to(dtype)
    weight = (vectors.conj() * (rho.to(dtype) @ vectors)).sum(-2).real
    return torch.where(levels <= noise_floor(sigma)[..., None], weight, 0.0).sum(-1) / _real_trace(rho)
