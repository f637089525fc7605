"""The quantum geometric tensor of a family of states: how far a small change of parameters moves them.

A user of attention gets the Fisher metric of a row in whatever parameters made it (query, temperature, positions): the
information lost to a small change, hence the resolution those parameters need. The Berry part sees phases only; it is
0 for plain softmax rows, whose amplitudes are real, and of use once amplitudes are complex.

Sources: J. P. Provost and G. Vallee, Commun. Math. Phys. 76 (1980) 289; M. V. Berry, Proc. R. Soc. A 392 (1984) 45;
S. L. Braunstein and C. M. Caves, Phys. Rev. Lett. 72 (1994) 3439; T. Fukui, Y. Hatsugai and H. Suzuki, J. Phys. Soc.
Jpn. 74 (2005) 1674.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, input_epsilon, real_dtype, widened
from aat_hf.quantum._spectral import lyapunov

Family = Callable[[Tensor], Tensor]


def geometric_tensor(family: Family, theta: Tensor) -> Tensor:
    """Q_ab = <d_a psi|(1 - |psi><psi|)|d_b psi> of normalised psi: (..., d, d), complex Hermitian.

    Args:
        family: maps (d,) to a state (n,), real or complex, of any nonzero norm; must work under `torch.func`.
        theta: (..., d), real.
    """

    def tensor(point: Tensor) -> Tensor:
        value, tangent = _value_and_tangents(family, point)
        state = widened(value)
        square = (state.conj() * state).sum().real
        across = tangent - state[:, None] * (state.conj() @ tangent) / square
        return (across.mH @ across / square).to(common_dtype(value).to_complex())

    return _over_points(tensor, theta)


def fubini_study_metric(family: Family, theta: Tensor) -> Tensor:
    """Re Q, a quarter of the quantum Fisher information: (..., d, d); arguments as in `geometric_tensor`."""
    return geometric_tensor(family, theta).real


def berry_curvature(family: Family, theta: Tensor) -> Tensor:
    """Omega_ab = -2 Im Q_ab, antisymmetric: (..., d, d); 0 for real families. Arguments as in `geometric_tensor`."""
    return -2 * geometric_tensor(family, theta).imag


def pure_fisher_information(family: Family, theta: Tensor) -> Tensor:
    """Quantum Fisher information 4 Re Q of a family of pure states: (..., d, d).

    For sqrt(p) it is the classical Fisher information of p. Arguments as in `geometric_tensor`.
    """
    return 4 * fubini_study_metric(family, theta)


def fisher_information(family: Family, theta: Tensor) -> Tensor:
    """Quantum Fisher information 2 sum_ij Re(<i|d_a rho|j><j|d_b rho|i>) / (l_i + l_j): (..., d, d), l_i + l_j > 0.

    Args:
        family: maps (d,) to a density matrix (n, n); must work under `torch.func`.
        theta: (..., d), real.

    It is Re tr(d_a rho L_b) with the symmetric logarithmic derivative L, the limit of 8 (1 - root_fidelity) / |d|^2.
    Pairs of eigenvalues that rounding cannot tell from 0 are left out.
    """

    def tensor(point: Tensor) -> Tensor:
        rho, tangent = _value_and_tangents(family, point)
        tangents = tangent.movedim(-1, 0)
        halves = lyapunov(rho, tangents)  # L / 2 for each parameter
        return 2 * torch.einsum("aij,bji->ab", tangents, halves).real.to(real_dtype(rho))

    return _over_points(tensor, theta)


def berry_phase(states: Tensor) -> Tensor:
    """-arg prod_n <psi_n|psi_{n+1}> around the closed loop of `states` (..., points, n): (...), in [-pi, pi].

    The discrete Wilson loop: independent of the phase of each state, error O(1 / points^2). The loop is closed from
    the last state to the first, which must not be repeated. NaN where neighbours are orthogonal: no phase exists.
    """
    links = _links(states, states.roll(-1, -2))
    return -torch.angle(links.prod(-1)).to(real_dtype(states))


def chern_number(states: Tensor) -> Tensor:
    """Chern number of a band `states` (..., rows, columns, n) on a grid periodic in both directions: (...), integral.

    Fukui, Hatsugai and Suzuki: the phases of all plaquettes, each in (-pi, pi], add up to 2 pi times an integer, the
    right one on a grid fine enough that no plaquette reaches pi. Sign as in `berry_curvature`.
    """
    down = _links(states, states.roll(-1, -3))
    right = _links(states, states.roll(-1, -2))
    plaquette = down * right.roll(-1, -2) * down.roll(-1, -1).conj() * right.conj()
    return (-torch.angle(plaquette).sum((-2, -1)) / (2 * torch.pi)).to(real_dtype(states))


def _links(a: Tensor, b: Tensor) -> Tensor:
    """<a|b> / |<a|b>| of (..., n): (...), complex128."""
    overlap = (widened(a).conj() * widened(b)).sum(-1).to(torch.complex128)
    # Below rounding of the sum the overlap is 0 and its phase noise: 0 / 0 makes that visible.
    size = overlap.abs()
    scale = torch.linalg.vector_norm(widened(a), dim=-1) * torch.linalg.vector_norm(widened(b), dim=-1)
    orthogonal = size <= input_epsilon(a) * scale.detach()
    return torch.where(orthogonal, torch.nan, overlap / torch.where(orthogonal, 1.0, size))


def _value_and_tangents(family: Family, point: Tensor) -> tuple[Tensor, Tensor]:
    """family(point), and its derivatives in a last dimension in double precision, by forward-mode differentiation."""

    def parts(p: Tensor) -> tuple[Tensor, Tensor]:
        value = family(p)
        return (torch.view_as_real(value) if value.is_complex() else value), value

    jacobian, value = torch.func.jacfwd(parts, has_aux=True)(point)
    if value.is_complex():
        jacobian = torch.view_as_complex(jacobian.movedim(-2, -1).contiguous())
    # Tangents of complex64 families may arrive in complex128 already: PyTorch promotes tangents of Python scalars.
    return value, widened(jacobian)


def _over_points(tensor: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    size = theta.shape[-1]
    points = theta.reshape(-1, size)
    return torch.func.vmap(tensor)(points).reshape(*theta.shape[:-1], size, size)
