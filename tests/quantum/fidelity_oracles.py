"""Root fidelity of mixed states with 60 digits, and what rounding the entries of density matrices does to it."""

from __future__ import annotations

import mpmath
import torch
from torch import Tensor


def exact_root_fidelity(x: Tensor, y: Tensor) -> float:
    """||x^H y||_1 / (||x||_F ||y||_F), the root fidelity of x x^H and y y^H, with 60 digits."""

    def norm(m: mpmath.matrix) -> mpmath.mpf:
        return mpmath.sqrt(mpmath.fsum(abs(v) ** 2 for v in m))

    with mpmath.workdps(60):
        x, y = (mpmath.matrix([[mpmath.mpc(complex(v)) for v in row] for row in m.tolist()]) for m in (x, y))
        return float(mpmath.fsum(mpmath.svd_c(x.H * y, compute_uv=False)) / norm(x) / norm(y))


def rounding_of_roots(rho: Tensor, sigma: Tensor, eps: float) -> Tensor:
    """How far rounding the entries by eps moves the square roots of eigenvalues l: 2 n eps / (2 sqrt l) of the least.

    What rounding cannot tell from 0 counts as 0 before and after.
    """
    values = torch.cat([torch.linalg.eigvalsh(x.to(torch.complex128)) for x in (rho, sigma)], -1)
    n = rho.shape[-1]
    return n * eps / torch.where(values > n * eps, values, 1.0).amin(-1).sqrt()
