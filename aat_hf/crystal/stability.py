"""Stability of a pattern under a map, such as a layer: linearisation, exponents, and the shape of the response.

What a user of attention gets: whether a small change of the input grows or dies from layer to layer (Lyapunov
exponents), which change a layer amplifies most and what comes out (`largest_gain`), and which output tiles answer to
a change of which input tile (`tile_response`): the tiles that must be recomputed when part of a text is edited.

A map is a function written with torch operations. Exponents are in nats a step. Sources: G. Benettin et al., Meccanica
15 (1980) 9; J.-P. Eckmann and D. Ruelle, Rev. Mod. Phys. 57 (1985) 617, sections III and V.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.crystal._groups import sum_blocks
from aat_hf.quantum._precision import real_dtype, widened

Map = Callable[[Tensor], Tensor]


class Mode(NamedTuple):
    """An input pattern of norm 1, its response of norm 1 and the gain between them: J pattern = gain response."""

    gain: Tensor
    pattern: Tensor
    response: Tensor


def jacobian(step: Map, x: Tensor) -> Tensor:
    """Derivative of a map (n,) -> (m,) at points x (..., n): (..., m, n)."""
    points = x.reshape(-1, x.shape[-1])
    each: Tensor = torch.func.vmap(torch.func.jacrev(step))(points)
    return each.reshape(*x.shape[:-1], *each.shape[1:])


def lyapunov_exponents(step: Map, x: Tensor, steps: int, discard: int = 0, count: int | None = None) -> Tensor:
    """The largest `count` (all n) Lyapunov exponents of a map (n,) -> (n,) on the orbits from x (..., n): (..., count).

    Tangents are carried along by Jacobian-vector products and made orthogonal by QR after every step (Benettin et al.
    1980); descending up to the noise of a finite orbit. A direction that the map wipes out has -inf.

    Args:
        steps: steps averaged over.
        discard: steps before, for the orbit to reach the attractor and the tangents their directions.

    Raises:
        ValueError: no step, or more exponents than dimensions.
    """
    dimension = x.shape[-1]
    count = dimension if count is None else count
    if steps < 1 or not 1 <= count <= dimension:
        raise ValueError(f"exponents need a step and 1 to {dimension} directions: {steps} steps, {count} directions")

    # Each tangent goes with its own copy of the point: one Jacobian-vector product of the whole batch a step.
    points = x.reshape(-1, dimension).repeat_interleave(count, 0)
    orbits = len(points) // count
    basis = torch.eye(dimension, count, dtype=x.dtype, device=x.device).expand(orbits, -1, -1)
    growth = torch.zeros((orbits, count), dtype=torch.float64, device=x.device)
    for index in range(discard + steps):
        tangents = basis.mT.reshape(-1, dimension)
        pushed = torch.func.jvp(torch.func.vmap(step), (points,), (tangents,))
        points, moved = pushed[0], pushed[1]
        basis, stretch = torch.linalg.qr(moved.unflatten(0, (orbits, count)).mT)
        if index >= discard:
            growth = growth + _log_stretch(stretch)
    return (growth / steps).to(x.dtype).reshape(*x.shape[:-1], count)


def product_exponents(jacobians: Tensor) -> Tensor:
    """Finite-time exponents of a product of Jacobians (steps, ..., n, n), the first one applied first: (..., n).

    Their sum is the mean of ln |det J| exactly. For the layers of a model: nats a layer.
    """
    basis = torch.eye(jacobians.shape[-1], dtype=torch.float64, device=jacobians.device)
    growth = torch.zeros(jacobians.shape[1:-1], dtype=torch.float64, device=jacobians.device)
    for each in widened(jacobians):
        basis, stretch = torch.linalg.qr(each @ basis)
        growth = growth + _log_stretch(stretch)
    return (growth / len(jacobians)).to(real_dtype(jacobians))


def floquet_multipliers(step: Map, x: Tensor, period: int = 1, tolerance: float | None = None) -> Tensor:
    """Eigenvalues of the derivative of `period` steps on periodic orbits through x (..., n): complex (..., n).

    The orbit is stable when all moduli are below 1; period 1 is the linear stability of a fixed point. By modulus,
    descending.

    Args:
        tolerance: how far x may be from its image after a period, relative to max(1, |x|); by default 1e3 eps.

    Raises:
        ValueError: the orbits are not periodic.
    """

    def cycle(point: Tensor) -> Tensor:
        for _ in range(period):
            point = step(point)
        return point

    gap = (torch.func.vmap(cycle)(x.reshape(-1, x.shape[-1])) - x.reshape(-1, x.shape[-1])).norm(dim=-1)
    bound = 1e3 * torch.finfo(x.dtype).eps if tolerance is None else tolerance
    size = x.reshape(-1, x.shape[-1]).norm(dim=-1).clamp(min=1)
    if not bool((gap <= bound * size).all()):
        raise ValueError(f"not an orbit of period {period}: after it x has moved by {float(gap.max()):.3g}")
    values = torch.linalg.eigvals(jacobian(cycle, x))
    return values.gather(-1, values.abs().argsort(dim=-1, descending=True))


def floquet_exponents(step: Map, x: Tensor, period: int = 1, tolerance: float | None = None) -> Tensor:
    """ln(multiplier) / period of `floquet_multipliers`: complex (..., n); real parts below 0 mean stability."""
    return floquet_multipliers(step, x, period, tolerance).log() / period


def largest_gain(step: Map, x: Tensor, iterations: int = 50, generator: torch.Generator | None = None) -> Mode:
    """The largest singular value of the derivative of a map at x, with its two patterns, without forming it.

    Power iteration on J'J, one Jacobian-vector and one vector-Jacobian product an iteration; x and the output may have
    any shapes. The gain approaches the true one from below, with an error of the order (s2 / s1)^(2 iterations).
    """
    pattern = torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device)
    pattern = pattern / pattern.norm()
    pull = torch.func.vjp(step, x)[1]
    for _ in range(iterations):
        pattern = _direction(pull(torch.func.jvp(step, (x,), (pattern,))[1])[0], pattern)
    moved = torch.func.jvp(step, (x,), (pattern,))[1]
    gain = moved.norm()
    return Mode(gain, pattern, _direction(moved, moved))


def tile_response(step: Map, x: Tensor, tile: int) -> Tensor:
    """Frobenius norm of d(output tile a) / d(input tile b) of a map (n, d) -> (n, e) at x (n, d): (tiles, tiles).

    Upper triangle 0 for causal attention. Memory: the whole Jacobian, n^2 d e numbers.
    """
    derivative: Tensor = torch.func.jacrev(step)(x)  # (n, e, n, d)
    return sum_blocks(derivative.square().sum((1, 3)), tile).sqrt()


def _log_stretch(triangle: Tensor) -> Tensor:
    return triangle.diagonal(dim1=-2, dim2=-1).abs().to(torch.float64).log()


def _direction(x: Tensor, otherwise: Tensor) -> Tensor:
    """x / |x|, or `otherwise` where a map that changes nothing leaves no direction."""
    norm = x.norm()
    return torch.where(norm > 0, x / torch.where(norm > 0, norm, 1.0), otherwise)
