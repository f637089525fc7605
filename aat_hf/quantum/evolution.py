"""Evolution of states: unitary, exp(-i H t), and through channels in Kraus form, with norm and trace kept.

A user of attention gets exact norm- and trace-preserving maps of heads to build studies on: phases on amplitudes that
softmax rows lack, noise models of keys that are dropped or mixed, and a check that refuses a map that is no channel.
Unitaries keep the norm to rounding for any ||H t||, and their gradient is right for degenerate H.

Source: Nielsen and Chuang (2000), sections 2.2.2 and 8.2; M.-D. Choi, Linear Algebra Appl. 10 (1975) 285.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, widened
from aat_hf.quantum._spectral import exp_minus_i, hermitian, noise_floor


def propagator(hamiltonian: Tensor, time: Tensor | float = 1.0) -> Tensor:
    """exp(-i H t), phase included: (..., n, n) complex.

    Args:
        hamiltonian: (..., n, n), Hermitian (its Hermitian part is taken), in units of 1 / time.
        time: number or (...), broadcast with the batch shape.

    Cost: one eigenvalue problem, n^3; `evolve` with the result then takes n^2 for each state.
    """
    dtype = common_dtype(hamiltonian).to_complex()
    time = torch.as_tensor(time, dtype=torch.float64, device=hamiltonian.device)
    return exp_minus_i(widened(hamiltonian) * time[..., None, None]).to(dtype)


def evolve(state: Tensor, unitary: Tensor) -> Tensor:
    """`unitary` (..., n, n) applied to `state` (..., n): (..., n)."""
    dtype = common_dtype(state, unitary)
    return (unitary.to(dtype) @ state.to(dtype)[..., None])[..., 0]


def evolve_density(rho: Tensor, unitary: Tensor) -> Tensor:
    """unitary rho unitary^H of (..., n, n): (..., n, n)."""
    dtype = common_dtype(rho, unitary)
    return unitary.to(dtype) @ rho.to(dtype) @ unitary.to(dtype).mH


def apply_channel(rho: Tensor, kraus: Tensor, check: bool = True) -> Tensor:
    """sum_k K_k rho K_k^H: the density matrix after a channel, (..., m, m).

    Args:
        rho: (..., n, n).
        kraus: (k, m, n) or (..., k, m, n).
        check: whether to verify that the trace is kept (`check_kraus`); inside `torch.func` transforms it cannot.

    Raises:
        ValueError: sum K^H K is not the identity.
    """
    if check:
        check_kraus(kraus)
    dtype = common_dtype(rho, kraus)
    kraus = kraus.to(dtype)
    return (kraus @ rho.to(dtype)[..., None, :, :] @ kraus.mH).sum(-3)


def check_kraus(kraus: Tensor, tolerance: float | None = None) -> None:
    """Raise unless `kraus` (..., k, m, n) keep the trace, sum K^H K = 1.

    Args:
        tolerance: allowed deviation of an entry; by default sqrt of the unit of rounding.

    Raises:
        ValueError: how far the sum is from the identity.
    """
    bound = math.sqrt(torch.finfo(common_dtype(kraus)).eps) if tolerance is None else tolerance
    wide = widened(kraus.detach())
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    excess = ((wide.mH @ wide).sum(-3) - identity).abs().amax()
    if not excess <= bound:
        raise ValueError(f"sum K^H K differs from the identity by {float(excess):.3g}, allowed {bound:.3g}")


def choi_matrix(kraus: Tensor) -> Tensor:
    """Choi matrix sum_ij |i><j| (x) Phi(|i><j|) of a channel: (..., k, m, n) -> (..., n m, n m), trace n.

    Two sets of Kraus operators are the same channel exactly if their Choi matrices are equal.
    """
    vectors = kraus.mT.flatten(-2)  # entry (i, a) is K[a, i]
    return vectors.mT @ vectors.conj()


def kraus_from_choi(choi: Tensor, inputs: int) -> Tensor:
    """Kraus operators (..., n m, m, n) of a Choi matrix (..., n m, n m) with n = `inputs`, zero ones last.

    Eigenvectors of equal eigenvalues are not unique: use the operators, not their derivatives.
    """
    values, vectors = torch.linalg.eigh(hermitian(choi))
    # A Choi matrix is positive semidefinite: negative eigenvalues are rounding (`is_cptp` tells otherwise).
    scaled = vectors * values.clamp(min=0.0).sqrt()[..., None, :]
    return scaled.mT.flip(-2).unflatten(-1, (inputs, -1)).mT.to(common_dtype(choi))


def is_cptp(choi: Tensor, inputs: int, tolerance: float | None = None) -> Tensor:
    """Whether a map with Choi matrix (..., n m, n m) is completely positive and keeps the trace: (...) bool.

    Args:
        inputs: dimension n the map acts on.
        tolerance: allowed deviation; by default sqrt of the unit of rounding.
    """
    bound = math.sqrt(torch.finfo(common_dtype(choi)).eps) if tolerance is None else tolerance
    wide = widened(choi)
    parts = wide.unflatten(-1, (inputs, -1)).unflatten(-3, (inputs, -1))
    trace = torch.einsum("...iaja->...ij", parts)
    identity = torch.eye(inputs, dtype=wide.dtype, device=wide.device)
    keeps_trace = (trace - identity).abs().amax((-2, -1)) <= bound
    skew = (wide - wide.mH).abs().amax((-2, -1)) <= bound
    positive = torch.linalg.eigvalsh(hermitian(choi)).amin(-1) >= -bound - noise_floor(choi)
    return keeps_trace & skew & positive
