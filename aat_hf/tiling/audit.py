"""The audit: realised infidelity of held-out random rows, measured against their exact log-sum-exp.

Keeping a set of keys and renormalising gives a state with fidelity F = exp(lse_kept - lse_exact); 1 - F is the
probability lost and the total variation distance to the exact attention row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aat_hf.quantum.fidelity import kept_infidelity

Z95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Audit:
    """Measured infidelity of sampled rows.

    Attributes:
        rows: (R,) int64, audited query rows, one per stratum of positions.
        infidelity: (batch, heads, R), NaN for rows that see no key.
    """

    rows: Tensor
    infidelity: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean infidelity: (batch, heads); NaN without rows."""
        return self.infidelity.nanmean(-1)

    @property
    def half_width(self) -> Tensor:
        """Half width of the 95 % confidence interval of `mean`: (batch, heads); NaN with fewer than two rows."""
        return half_width(self.infidelity)


def half_width(infidelity: Tensor) -> Tensor:
    """Half width of the 95 % interval of the mean over the last dimension, NaN left out; NaN below two values.

    Audited rows are stratified by position, so the formula for independent rows is an upper estimate.
    """
    count = (~infidelity.isnan()).sum(-1)
    squares = (infidelity - infidelity.nanmean(-1, keepdim=True)).square().nansum(-1)
    width = Z95 * (squares / (count - 1).clamp(min=1) / count.clamp(min=1)).sqrt()
    return torch.where(count > 1, width, torch.nan)


def audit_rows(lse_kept: Tensor, lse_exact: Tensor, rows: Tensor) -> Audit:
    """Compare kernel and exact log-sum-exp of `rows`: both (batch, heads, R)."""
    return Audit(rows, kept_infidelity(lse_kept, lse_exact))
