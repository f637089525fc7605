"""States: preparing them from amplitudes, probabilities, scores and attention rows, joining and reducing them.

A user of attention gets each softmax row as the unit vector sqrt(p), on which errors are angles and lengths, and a
whole head as one density matrix (or the smaller Gram matrix of the same spectrum) that says how many different maps
its rows hold. A row that sees no key is the zero vector everywhere in this package.

Source: M. A. Nielsen and I. L. Chuang, *Quantum Computation and Quantum Information* (2000), sections 2.1, 2.4, 2.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, components, real_dtype, widened
from aat_hf.quantum._spectral import sqrt_psd


def norm(state: Tensor) -> Tensor:
    """Length of `state` (..., n): (...), real; no overflow for entries whose squares would."""
    state = state.to(common_dtype(state))
    scaled, scale = _scaled(state)
    return (torch.linalg.vector_norm(components(scaled), dim=-1, dtype=torch.float64) * scale).to(real_dtype(state))


def from_amplitudes(amplitudes: Tensor) -> Tensor:
    """Normalise `amplitudes` (..., n), real or complex, of any finite size: (..., n); zero rows stay zero."""
    amplitudes = amplitudes.to(common_dtype(amplitudes))
    scaled, _ = _scaled(amplitudes)
    length = torch.linalg.vector_norm(components(scaled), dim=-1, keepdim=True, dtype=torch.float64)
    return scaled / torch.where(length == 0, 1.0, length).to(real_dtype(amplitudes))


def from_probabilities(probabilities: Tensor, phase: Tensor | None = None) -> Tensor:
    """sqrt(p) e^{i phase}, normalised: (..., n), complex when `phase` is given.

    Args:
        probabilities: (..., n), >= 0, of any positive sum; a zero row stays zero, a negative entry gives NaN.
        phase: (..., n), radians.

    The derivative of sqrt at 0 is infinite; here it is taken as 0. `from_scores` has the exact one at every score.
    """
    probabilities = probabilities.to(common_dtype(probabilities))
    zero = probabilities == 0
    return _with_phase(from_amplitudes(torch.where(zero, 0.0, torch.where(zero, 1.0, probabilities).sqrt())), phase)


def from_scores(scores: Tensor, phase: Tensor | None = None) -> Tensor:
    """sqrt(softmax(scores)) e^{i phase}: (..., n), complex when `phase` is given.

    Args:
        scores: (..., n), finite or -inf; a row of -inf gives the zero state.
        phase: (..., n), radians.
    """
    scores = scores.to(common_dtype(scores))
    highest = scores.detach().amax(-1, keepdim=True)
    amplitude = torch.exp((scores - highest.masked_fill(highest == float("-inf"), 0.0)) / 2)
    return _with_phase(from_amplitudes(amplitude), phase)


def tensor_product(*states: Tensor) -> Tensor:
    """Joint state of independent `states`, each (..., n_i), batch shapes broadcast: (..., n_1 n_2 ...)."""
    joint = states[0]
    for state in states[1:]:
        joint = (joint[..., :, None] * state[..., None, :]).flatten(-2)
    return joint


def operator_product(*operators: Tensor) -> Tensor:
    """Tensor product of `operators`, each (..., n_i, n_i), batch shapes broadcast: (..., n_1 n_2 ..., n_1 n_2 ...)."""
    joint = operators[0]
    for operator in operators[1:]:
        joint = joint[..., :, None, :, None] * operator[..., None, :, None, :]
        joint = joint.flatten(-4, -3).flatten(-2)
    return joint


def projector(state: Tensor) -> Tensor:
    """|state><state|: (..., n) -> (..., n, n)."""
    return state[..., :, None] * state[..., None, :].conj()


def density_matrix(states: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mixture sum_i w_i |psi_i><psi_i| of `states` (..., m, n): (..., n, n).

    Args:
        states: (..., m, n), e.g. the states of the m query rows of a head.
        weights: (..., m), >= 0 with sum 1; by default equal for the states that are not zero.
    """
    weights = _weights(states, weights)
    return (states * weights[..., None]).mT @ states.conj()


def weighted_rows(states: Tensor, weights: Tensor | None = None) -> Tensor:
    """sqrt(w_i) psi_i of `states` (..., m, n): (..., m, n), a matrix X with X^T X^* = `density_matrix`.

    Args:
        weights: as in `density_matrix`.
    """
    weights = _weights(states, weights)
    zero = weights == 0
    root = torch.where(zero, 0.0, torch.where(zero, 1.0, weights).sqrt())
    return states * root[..., None]


def gram_matrix(states: Tensor, weights: Tensor | None = None) -> Tensor:
    """sqrt(w_i w_j) <psi_i|psi_j>: (..., m, m), with the nonzero eigenvalues of `density_matrix`.

    It stands for that matrix in everything that asks for eigenvalues alone, at m^2 n + m^3 operations: entropies, the
    effective rank, the purity.

    Args:
        states: (..., m, n).
        weights: as in `density_matrix`.
    """
    scaled = weighted_rows(states, weights)
    return scaled.conj() @ scaled.mT


def head_density(attention: Tensor) -> Tensor:
    """Density matrix over the keys of heads whose rows are `attention` (..., queries, keys): (..., keys, keys)."""
    return density_matrix(from_probabilities(attention))


def partial_trace(rho: Tensor, dims: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Density matrix of the subsystems `keep`, in the order given: (..., n, n) -> (..., k, k).

    Args:
        rho: (..., n, n) with n the product of `dims`.
        dims: dimension of each subsystem, in the order of `tensor_product`.
        keep: indices into `dims`.

    Raises:
        ValueError: `dims` does not multiply to n, or `keep` repeats or leaves its range.
    """
    order, kept = _split(rho.shape[-1], dims, keep)
    batch = rho.shape[:-2]
    axes = [*range(len(batch)), *(len(batch) + i for i in order), *(len(batch) + len(dims) + i for i in order)]
    parts = rho.reshape(*batch, *dims, *dims).permute(axes).reshape(*batch, kept, -1, kept, rho.shape[-1] // kept)
    return torch.einsum("...krlr->...kl", parts)


def reduced_state(state: Tensor, dims: Sequence[int], keep: Sequence[int]) -> Tensor:
    """`partial_trace` of a pure `state` (..., n) without forming its (n, n) projector: (..., k, k)."""
    order, kept = _split(state.shape[-1], dims, keep)
    batch = state.shape[:-1]
    axes = [*range(len(batch)), *(len(batch) + i for i in order)]
    parts = state.reshape(*batch, *dims).permute(axes).reshape(*batch, kept, state.shape[-1] // kept)
    return parts @ parts.mH


def purify(rho: Tensor) -> Tensor:
    """A pure state on two copies whose `reduced_state(..., (n, n), (0,))` is `rho` (..., n, n): (..., n * n).

    The canonical purification, sqrt(rho) read row by row (Nielsen and Chuang, section 2.5).
    """
    return sqrt_psd(rho).to(common_dtype(rho)).flatten(-2)


def check_density_matrix(rho: Tensor, tolerance: float | None = None) -> None:
    """Raise unless `rho` (..., n, n) is Hermitian, positive semidefinite and of trace 1.

    Args:
        tolerance: allowed deviation of each; by default sqrt of the unit of rounding.

    Raises:
        ValueError: which property fails, and by how much.
    """
    if rho.ndim < 2 or rho.shape[-1] != rho.shape[-2]:
        raise ValueError(f"a density matrix is square, not {tuple(rho.shape)}")
    bound = math.sqrt(torch.finfo(common_dtype(rho)).eps) if tolerance is None else tolerance
    wide = widened(rho.detach())
    # In this order, so that NaN is found before the eigensolver stumbles over it.
    _refuse(wide.diagonal(dim1=-2, dim2=-1).sum(-1) - 1, bound, "of trace 1")
    _refuse(wide - wide.mH, bound, "Hermitian")
    _refuse(torch.linalg.eigvalsh(wide).clamp(max=0.0), bound, "positive semidefinite")


def _refuse(deviation: Tensor, bound: float, property_: str) -> None:
    excess = deviation.abs().amax()
    if not excess <= bound:
        raise ValueError(f"the density matrix is not {property_}: off by {float(excess):.3g}, allowed {bound:.3g}")


def _scaled(state: Tensor) -> tuple[Tensor, Tensor]:
    """`state` divided by its largest component, so that its length is in [1, sqrt(2 n)], and that divisor (...)."""
    parts = components(state)
    scale = parts.detach().abs().amax(-1, keepdim=True)
    scale = torch.where(scale == 0, 1.0, scale)
    # Component by component: complex division by a tiny number would pass through its overflowing reciprocal.
    scaled = parts / scale
    whole = torch.view_as_complex(scaled.unflatten(-1, (-1, 2))) if state.is_complex() else scaled
    return whole, scale[..., 0]


def _with_phase(amplitude: Tensor, phase: Tensor | None) -> Tensor:
    if phase is None:
        return amplitude
    phase = phase.to(amplitude.dtype)
    return torch.complex(amplitude * phase.cos(), amplitude * phase.sin())


def _weights(states: Tensor, weights: Tensor | None) -> Tensor:
    if weights is not None:
        return weights.to(real_dtype(states))
    alive = (states != 0).any(-1).to(real_dtype(states))
    return alive / alive.sum(-1, keepdim=True).clamp(min=1)  # a count: below 1 it is 0, and no weight is left to share


def _split(size: int, dims: Sequence[int], keep: Sequence[int]) -> tuple[list[int], int]:
    """Axis order (kept first, then the rest) and the dimension of what is kept."""
    if math.prod(dims) != size:
        raise ValueError(f"subsystems {tuple(dims)} make {math.prod(dims)} dimensions, the state has {size}")
    if len(set(keep)) != len(keep) or not set(keep) <= set(range(len(dims))):
        raise ValueError(f"keep {tuple(keep)} does not name distinct subsystems out of {len(dims)}")
    return [*keep, *(i for i in range(len(dims)) if i not in keep)], math.prod(dims[i] for i in keep)
