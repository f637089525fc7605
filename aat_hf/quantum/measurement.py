"""Measurement: Born probabilities, states after an outcome, expectations, and the projectors onto key tiles.

A user of attention gets the tile masses of a row as Born probabilities, sparse attention as the projection onto the
kept tiles with renormalisation (its fidelity to the full row is the mass kept), and unbiased sampling of keys or
tiles with a generator. Pinching is what a head looks like to an observer who only sees tiles.

Source: Nielsen and Chuang (2000), section 2.2 (postulate 3, POVM measurements) and theorem 11.9 (pinching).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.quantum._precision import common_dtype, real_dtype, widened
from aat_hf.quantum._tiles import tile_index
from aat_hf.quantum.states import norm


class Outcomes(NamedTuple):
    """Result of a measurement that is not read.

    probabilities: (..., outcomes), real; states: after each outcome, (..., outcomes, n) for a pure state or
    (..., outcomes, n, n) for a density matrix, normalised, 0 where the outcome has probability 0.
    """

    probabilities: Tensor
    states: Tensor


def expectation(state: Tensor, operator: Tensor) -> Tensor:
    """<state|operator|state> of `state` (..., n) and `operator` (..., n, n), not necessarily Hermitian: (...)."""
    dtype = torch.promote_types(state.dtype, operator.dtype)
    state = state.to(dtype)
    return (state.conj() * (operator.to(dtype) @ state[..., None])[..., 0]).sum(-1)


def mixed_expectation(rho: Tensor, operator: Tensor) -> Tensor:
    """tr(rho operator) of `rho` and `operator` (..., n, n): (...)."""
    return (rho * operator.mT).sum((-2, -1))


def born_probabilities(state: Tensor, effects: Tensor) -> Tensor:
    """<state|E_k|state> of `state` (..., n) for the `effects` (k, n, n) of a POVM: (..., k), real."""
    return expectation(state[..., None, :], effects).real


def mixed_probabilities(rho: Tensor, effects: Tensor) -> Tensor:
    """tr(rho E_k) of `rho` (..., n, n) for the `effects` (k, n, n) of a POVM: (..., k), real."""
    return mixed_expectation(rho[..., None, :, :], effects).real


def measure(state: Tensor, operators: Tensor) -> Outcomes:
    """Measure a pure `state` (..., n) with `operators` M_k (k, n, n), sum M_k^H M_k = 1; projectors are their own M."""
    dtype = common_dtype(state, operators)
    after = (operators.to(dtype) @ state.to(dtype)[..., None, :, None])[..., 0]
    length = norm(after)
    return Outcomes(length.square(), after / torch.where(length == 0, 1.0, length)[..., None])


def measure_density(rho: Tensor, operators: Tensor) -> Outcomes:
    """Measure a density matrix `rho` (..., n, n) with `operators` M_k (k, n, n), sum M_k^H M_k = 1."""
    dtype = common_dtype(rho, operators)
    operators = operators.to(dtype)
    after = operators @ rho.to(dtype)[..., None, :, :] @ operators.mH
    mass = after.diagonal(dim1=-2, dim2=-1).sum(-1).real
    return Outcomes(mass, after / torch.where(mass == 0, 1.0, mass)[..., None, None])


def sample(probabilities: Tensor, shots: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw `shots` independent outcomes from `probabilities` (..., n), of any positive sum: (..., shots) int64.

    Raises:
        RuntimeError: a row without weight, or a negative or infinite probability (from `torch.multinomial`).
    """
    flat = probabilities.reshape(-1, probabilities.shape[-1])
    drawn = torch.multinomial(flat, shots, replacement=True, generator=generator)
    return drawn.reshape(*probabilities.shape[:-1], shots)


def check_povm(effects: Tensor, tolerance: float | None = None) -> None:
    """Raise unless `effects` (k, n, n) are positive semidefinite and add up to the identity.

    Args:
        tolerance: allowed deviation; by default sqrt of the unit of rounding.

    Raises:
        ValueError: which property fails, and by how much.
    """
    bound = math.sqrt(torch.finfo(common_dtype(effects)).eps) if tolerance is None else tolerance
    wide = widened(effects.detach())
    identity = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    # In this order, so that NaN is found before the eigensolver stumbles over it.
    _refuse(wide.sum(0) - identity, bound, "add up to the identity")
    _refuse(wide - wide.mH, bound, "be Hermitian")
    _refuse(torch.linalg.eigvalsh(wide).clamp(max=0.0), bound, "be positive semidefinite")


def tile_projectors(keys: int, key_tile: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Projectors onto the key tiles as matrices: (key_tiles, keys, keys); the last tile may be shorter.

    For small examples and checks; `tile_probabilities` and `project_tiles` do the same without matrices.
    """
    tile = tile_index(keys, key_tile)
    member = tile == torch.arange(-(-keys // key_tile))[:, None]
    return torch.diag_embed(member.to(dtype))


def tile_probabilities(state: Tensor, key_tile: int) -> Tensor:
    """Born probabilities of the key tiles, the tile masses of an attention row: (..., keys) -> (..., key_tiles)."""
    wide = widened(state)
    density = (wide.conj() * wide).real
    index, tiles = tile_index(state.shape[-1], key_tile, state.device), -(-state.shape[-1] // key_tile)
    masses = density.new_zeros((*density.shape[:-1], tiles)).index_add(-1, index, density)
    return masses.to(real_dtype(state))


def project_tiles(state: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Project a normalised `state` (..., keys) onto its kept keys and renormalise: sparse attention, exactly.

    Args:
        kept: (..., keys) bool; for tiles, `kept_tiles.repeat_interleave(key_tile, -1)[..., :keys]`.

    Returns:
        The mass kept (...), which is the fidelity of the result to `state`, and the state after (..., keys); 0 where
        no mass is kept.
    """
    projected = torch.where(kept, state, 0.0)
    length = norm(projected)
    return length.square(), projected / torch.where(length == 0, 1.0, length)[..., None]


def pinch_tiles(rho: Tensor, key_tile: int) -> Tensor:
    """sum_T Pi_T rho Pi_T over key tiles: `rho` (..., keys, keys) without what links different tiles.

    The state after a tile measurement that is not read; its entropy is never lower.
    """
    tile = tile_index(rho.shape[-1], key_tile, rho.device)
    return torch.where(tile[:, None] == tile, rho, 0.0)


def _refuse(deviation: Tensor, bound: float, duty: str) -> None:
    excess = deviation.abs().amax()
    if not excess <= bound:
        raise ValueError(f"the effects of a POVM have to {duty}: off by {float(excess):.3g}, allowed {bound:.3g}")
