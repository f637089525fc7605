"""Exact optimal transport between small measures: the Wasserstein-1 distance.

What a user of attention gets: how far the neighbourhoods of two tiles are apart, the number behind Ollivier curvature.

Source: C. Villani, *Topics in Optimal Transportation* (2003), section 1.1. Linear programs are solved by HiGHS through
SciPy, exactly up to rounding (the optimum is a vertex).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 22  # entries of the pair table held at a time


def wasserstein(supply: Tensor, demand: Tensor, distance: Tensor) -> Tensor:
    """Least cost of moving `supply` to `demand`, both (pairs, n) of equal sums: (pairs,) float64, no gradient.

    Mass that both measures share stays where it is, which a metric allows; the rest of many pairs is solved in one
    linear program. Cost: about (points that change)^3 for each pair.

    Args:
        distance: (pairs or 1, n, n), a metric; inf only between points that no mass has to travel.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: sums of a pair differ, so that no transport exists.
    """
    mu, nu = supply.detach().double().cpu(), demand.detach().double().cpu()
    if not torch.allclose(mu.sum(-1), nu.sum(-1), rtol=1e-9, atol=1e-12):
        raise ValueError("supply and demand of a pair must have equal sums")
    cost = distance.detach().double().cpu().expand(len(mu), -1, -1)
    step = max(1, _CHUNK // (mu.shape[-1] ** 2))
    parts = [
        _solve(*(x.numpy() for x in part))
        for part in zip(mu.split(step), nu.split(step), cost.split(step), strict=True)
    ]
    found = np.concatenate(parts) if parts else np.zeros(0)
    return torch.from_numpy(found).to(supply.device)


def _solve(mu: NDArray[np.float64], nu: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """One linear program for all pairs: a variable for each (pair, giving point, taking point)."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise ImportError("optimal transport needs SciPy: pip install scipy") from error
    rounding = 1e-15 * mu.shape[1]
    surplus, shortage = (np.where(x > rounding, x, 0.0) for x in (mu - nu, nu - mu))
    pair, giver, taker = np.nonzero((surplus[:, :, None] > 0) & (shortage[:, None, :] > 0))
    if not len(pair):
        return np.zeros(len(mu))
    give_row = np.cumsum(surplus > 0).reshape(surplus.shape) - 1
    take_row = np.cumsum(shortage > 0).reshape(shortage.shape) + give_row[-1, -1]
    row = np.concatenate([give_row[pair, giver], take_row[pair, taker]])
    column = np.tile(np.arange(len(pair)), 2)
    bounds = np.concatenate([surplus[surplus > 0], shortage[shortage > 0]])
    balance = coo_array((np.ones(len(row)), (row, column)), shape=(len(bounds), len(pair))).tocsr()
    price = cost[pair, giver, taker]
    plan = linprog(price, A_eq=balance, b_eq=bounds, method="highs")
    if plan.status != 0:
        raise ValueError(f"no transport plan was found: {plan.message}")
    moved = np.bincount(pair, weights=price * plan.x, minlength=len(mu))
    return moved.astype(np.float64)
