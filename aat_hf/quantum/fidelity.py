"""Fidelity and the distances that follow from it, accurate for near states and never above 1.

A user of attention gets the error measure of this package: 1 - fidelity of sparse and exact rows is the probability
lost, bounds the total variation, and its angle is half the Fisher-Rao distance. Near rows (angle 1e-3 and below) keep
full relative accuracy, and so do heads as a whole, compared through their density matrices.

Cost: pure states of n amplitudes take n operations, mixtures of m states (`ensemble_...`) m^2 n + m^3, density matrices
n^3: two eigenvalue problems and a singular value decomposition. For n = 512 and m = 16 about .5, 1 and 450 ms on a CPU.

Sources: R. Jozsa, *Fidelity for mixed quantum states*, J. Mod. Opt. 41 (1994); A. Uhlmann, Rep. Math. Phys. 9 (1976);
I. Bengtsson and K. Zyczkowski, *Geometry of Quantum States* (2006), sections 4.5, 9.4 and 14.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, components, real_dtype, widened
from aat_hf.quantum._spectral import hermitian, sqrt_psd
from aat_hf.quantum.states import weighted_rows


def fidelity(a: Tensor, b: Tensor) -> Tensor:
    """|<a|b>|^2 / (<a|a> <b|b>) of pure states (..., n), batch shapes broadcast: (...), real, in [0, 1].

    NaN where a state is zero, as a row that sees no key is in the audit. Squared norms must fit float64.
    """
    cosine, sine, alive = _decompose(a, b)
    # <b|b> = cosine^2 + sine^2, so that rounding cannot lift the quotient above 1 and nothing has to be clamped.
    return _only(cosine**2 / _square(cosine, sine, alive), alive).to(real_dtype(a, b))


def infidelity(a: Tensor, b: Tensor) -> Tensor:
    """1 - `fidelity`, formed without the subtraction: (...), real, in [0, 1]; 0 exactly where a equals b."""
    cosine, sine, alive = _decompose(a, b)
    return _only(sine**2 / _square(cosine, sine, alive), alive).to(real_dtype(a, b))


def kept_infidelity(lse_kept: Tensor, lse_exact: Tensor) -> Tensor:
    """`infidelity` of a softmax row and its restriction to kept keys, from their log-sum-exps (...): (...).

    The fidelity is the mass kept, exp(lse_kept - lse_exact); NaN for rows that see no key. No state has to be formed.
    """
    lost = -torch.expm1((lse_kept - lse_exact).double())
    return lost.masked_fill(lse_exact == float("-inf"), torch.nan).to(real_dtype(lse_exact))


def fubini_study(a: Tensor, b: Tensor) -> Tensor:
    """Angle arccos |<a|b>| between the rays of pure states (..., n): (...), radians in [0, pi / 2].

    For attention rows half their Fisher-Rao distance. NaN where a state is zero.
    """
    cosine, sine, alive = _decompose(a, b)
    return _only(_angle(cosine, sine, alive), alive).to(real_dtype(a, b))


def bures_distance(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(2 (1 - |<a|b>|)) of pure states (..., n): (...), in [0, sqrt 2]. NaN where a state is zero."""
    cosine, sine, alive = _decompose(a, b)
    return _only(2 * torch.sin(_angle(cosine, sine, alive) / 2), alive).to(real_dtype(a, b))


def mixed_fidelity(rho: Tensor, sigma: Tensor) -> Tensor:
    """||sqrt(rho) sqrt(sigma)||_1^2 / (tr rho tr sigma) of density matrices (..., n, n): (...), real, in [0, 1].

    Square roots of eigenvalues count: entries rounded by e move one of size l by e / (2 sqrt l), so that a level of
    1e-10 leaves eleven digits in float64. For mixtures of given states `ensemble_infidelity` needs no roots. NaN where
    a matrix is 0, as in the distances below.
    """
    return root_fidelity(rho, sigma) ** 2


def root_fidelity(rho: Tensor, sigma: Tensor) -> Tensor:
    """Square root of `mixed_fidelity`, the convention of QuTiP: (...)."""
    left, right = _roots(rho, sigma)
    # The nuclear norm as the largest Re tr(left^H right U): exact value and gradient without differentiating an SVD.
    overlap = (left.conj() * (right @ _alignment(left, right))).sum((-2, -1)).real
    # Cauchy-Schwarz: the true value is at most 1, so that min(., 1) can only move towards it; it is 1 at rho = sigma,
    # where the gradient is 0 as well.
    return _only(overlap.clamp(max=1.0), _both_nonzero(left, right)).to(real_dtype(rho, sigma))


def mixed_infidelity(rho: Tensor, sigma: Tensor) -> Tensor:
    """1 - `mixed_fidelity` without the subtraction: (...), real, in [0, 1]."""
    square = _wide_bures(rho, sigma) ** 2
    return (square * (1 - square / 4)).to(real_dtype(rho, sigma))


def mixed_bures_distance(rho: Tensor, sigma: Tensor) -> Tensor:
    """sqrt(2 (1 - root_fidelity)) of density matrices (..., n, n), as min_U ||sqrt(rho) - sqrt(sigma) U||_F: (...)."""
    return _wide_bures(rho, sigma).to(real_dtype(rho, sigma))


def bures_angle(rho: Tensor, sigma: Tensor) -> Tensor:
    """arccos of `root_fidelity` of density matrices (..., n, n): (...), radians in [0, pi / 2]."""
    # D = 2 sin(angle / 2) and D <= sqrt 2 up to rounding: the argument of asin stays below 0.71.
    return (2 * torch.asin(_wide_bures(rho, sigma) / 2)).to(real_dtype(rho, sigma))


def ensemble_infidelity(
    a: Tensor, b: Tensor, a_weights: Tensor | None = None, b_weights: Tensor | None = None
) -> Tensor:
    """`mixed_infidelity` of mixtures of pure states a (..., m, n) and b (..., k, n), such as rows of two heads: (...).

    Without density matrices and their roots, hence more exact: for X^T X^* = rho and Y^T Y^* = sigma the root fidelity
    is ||X^* Y^T||_1 (Uhlmann), of a matrix (m, k). Weights are as in `states.density_matrix`; NaN where all are zero.
    """
    square = _ensemble_bures(a, b, a_weights, b_weights) ** 2
    return (square * (1 - square / 4)).to(real_dtype(a, b))


def ensemble_bures_angle(
    a: Tensor, b: Tensor, a_weights: Tensor | None = None, b_weights: Tensor | None = None
) -> Tensor:
    """`bures_angle` of mixtures, as `ensemble_infidelity`, whose arcsin sqrt it is: (...), radians in [0, pi / 2]."""
    return (2 * torch.asin(_ensemble_bures(a, b, a_weights, b_weights) / 2)).to(real_dtype(a, b))


def total_variation(p: Tensor, r: Tensor) -> Tensor:
    """sum |p - r| / 2 of probabilities (..., n): (...), in [0, 1]."""
    return ((p - r).abs().sum(-1, dtype=torch.float64) / 2).to(real_dtype(p, r))


def trace_distance(rho: Tensor, sigma: Tensor) -> Tensor:
    """||rho - sigma||_1 / 2 of density matrices (..., n, n): (...), in [0, 1]; pure: sin of `fubini_study`."""
    difference = hermitian(widened(rho) - widened(sigma))
    return (torch.linalg.eigvalsh(difference).abs().sum(-1) / 2).to(real_dtype(rho, sigma))


def _decompose(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of b along and across a, in float64 and up to a common factor, and whether both are nonzero: each (...).

    The part across is taken from b - a: for near states the subtraction is exact and nothing cancels after it.
    """
    dtype = common_dtype(a, b, torch.empty((), dtype=torch.float64))
    a, b = torch.broadcast_tensors(a.to(dtype), b.to(dtype))
    alive = (a != 0).any(-1) & (b != 0).any(-1)
    square = torch.where(alive, _inner(a, a).real, 1.0)
    # Rays have no length: a power of two, which is exact, brings b to that of a to within a factor sqrt 2.
    ratio = square.detach() / torch.where(alive, _inner(b, b).real.detach(), 1.0)
    b = b * torch.exp2((ratio.log2() / 2).round())[..., None]
    difference = b - a
    across = difference - a * (_inner(a, difference) / square)[..., None]
    return _inner(a, b).abs() / square.sqrt(), torch.linalg.vector_norm(components(across), dim=-1), alive


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum(-1)


def _square(cosine: Tensor, sine: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, cosine**2 + sine**2, 1.0)


def _angle(cosine: Tensor, sine: Tensor, alive: Tensor) -> Tensor:
    return torch.atan2(sine, torch.where(alive, cosine, 1.0))


def _only(value: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive, value, torch.nan)


def _roots(rho: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of both matrices, of Frobenius norm 1, in one double precision dtype."""
    return _normalised(sqrt_psd(rho), sqrt_psd(sigma))


def _normalised(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both over their Frobenius norms, 0 where that is 0, in one dtype."""
    dtype = torch.promote_types(left.dtype, right.dtype)
    norms = [_frobenius(x)[..., None, None] for x in (left, right)]
    left, right = (x.to(dtype) / torch.where(n == 0, 1.0, n) for x, n in zip((left, right), norms, strict=True))
    return left, right


def _frobenius(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(components(x).flatten(-2), dim=-1)  # of real numbers: the complex one is slow


def _alignment(left: Tensor, right: Tensor) -> Tensor:
    """The unitary U (..., r, r) that brings right U nearest to left (..., n, r), the polar factor of right^H left.

    It is a constant for derivatives: U is where the minimum is attained, so its own change does not count (envelope
    theorem).
    """
    u, _, vh = torch.linalg.svd(right.detach().mH @ left.detach())
    return u @ vh


def _aligned_distance(left: Tensor, right: Tensor) -> Tensor:
    """min_U ||left - right U||_F over unitary U, of matrices (..., n, r) of norm 1: (...); NaN where one is 0."""
    return _only(_frobenius(left - right @ _alignment(left, right)), _both_nonzero(left, right))


def _both_nonzero(left: Tensor, right: Tensor) -> Tensor:
    return (left != 0).any(-1).any(-1) & (right != 0).any(-1).any(-1)


def _wide_bures(rho: Tensor, sigma: Tensor) -> Tensor:
    return _aligned_distance(*_roots(rho, sigma))


def _ensemble_bures(a: Tensor, b: Tensor, a_weights: Tensor | None, b_weights: Tensor | None) -> Tensor:
    rows = [weighted_rows(widened(x), weights) for x, weights in ((a, a_weights), (b, b_weights))]
    count = max(x.shape[-2] for x in rows)  # zero rows add nothing to a mixture
    left, right = (torch.nn.functional.pad(x, (0, 0, 0, count - x.shape[-2])).mT for x in rows)
    return _aligned_distance(*_normalised(left, right))
