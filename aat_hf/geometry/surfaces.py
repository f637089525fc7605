"""Closed surfaces with a conformal metric e^{2u} g0: curvature, area and Ricci flow of a field u on a grid.

What a user of attention gets: the smoothing of a resolution field u (how fine tiles must be, per position) under which
curvature evens out: the area falls at a rate that topology alone sets, or stays with the normalised flow. An analysis
tool.

In two dimensions Ricci flow is u_t = -K with K = e^{-2u} (K0 - Lap u), Lap and K0 of the fixed metric g0. It is
integrated for e^{2u}, whose equation d(e^{2u})/dt = Lap 2u - 2 K0 conserves: total curvature is exact (Gauss-Bonnet),
and so is the area A(t) = A(0) - 2 t K0 A0, both to rounding.

Source: R. S. Hamilton, *The Ricci flow on surfaces*, Contemp. Math. 71 (1988), section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aat_hf.geometry.flow import FlowSingularityError, integrate

_STABLE = 2.5  # Runge-Kutta 4 is stable for step * |eigenvalue| <= 2.785 on the negative axis
_CHANGE = 0.05  # of the area element in one step


@dataclass(frozen=True)
class Surface:
    """A closed surface with a metric g0 of constant curvature, on m grid points. Fields are (..., m).

    Attributes:
        laplacian: (m, m) float64 Laplacian of g0; `weights @ laplacian` is 0 and `weights * laplacian` symmetric.
        weights: (m,) float64, area of g0 that each point stands for.
        curvature: Gauss curvature of g0.
        points: (m, coordinates) where the grid points are.
    """

    laplacian: Tensor
    weights: Tensor
    curvature: float
    points: Tensor

    def gauss_curvature(self, u: Tensor) -> Tensor:
        """K of the metric e^{2u} g0: (..., m)."""
        return torch.exp(-2 * u) * (self.curvature - u @ self.laplacian.mT)

    def area(self, u: Tensor) -> Tensor:
        """Area of the metric e^{2u} g0: (...)."""
        return torch.exp(2 * u) @ self.weights

    def integral(self, field: Tensor, u: Tensor) -> Tensor:
        """Integral of `field` over the metric e^{2u} g0: (...)."""
        return (field * torch.exp(2 * u)) @ self.weights


def round_sphere(order: int) -> Surface:
    """Unit sphere, fields of the latitude only, at `order` Gauss-Legendre points x = cos(polar angle), (order, 1).

    Exact for polynomials in x of degree below `order`; its metrics are surfaces of revolution.
    """
    x, w = np.polynomial.legendre.leggauss(order)
    degree = np.arange(order)
    modes = np.polynomial.legendre.legvander(x, order - 1) * np.sqrt(degree + 0.5)  # orthonormal under w
    laplacian = (modes * -(degree * (degree + 1.0))) @ (modes.T * w)
    return Surface(torch.from_numpy(laplacian), torch.from_numpy(2 * math.pi * w), 1.0, torch.from_numpy(x[:, None]))


def flat_torus(size: int, side: float = 2 * math.pi) -> Surface:
    """Square flat torus with `size` x `size` points (x, y), (size^2, 2), and the spectral (Fourier) Laplacian."""
    wave = np.fft.fftfreq(size, side / (2 * math.pi * size))  # integer modes times 2 pi / side
    circle = np.fft.ifft(-(wave**2)[:, None] * np.fft.fft(np.eye(size), axis=0), axis=0).real
    eye = np.eye(size)
    laplacian = np.kron(circle, eye) + np.kron(eye, circle)
    x, y = np.meshgrid(*[np.arange(size) * side / size] * 2, indexing="ij")
    weights = np.full(size * size, (side / size) ** 2)
    points = np.stack([x.ravel(), y.ravel()], -1)
    return Surface(torch.from_numpy(laplacian), torch.from_numpy(weights), 0.0, torch.from_numpy(points))


def ricci_flow(surface: Surface, u: Tensor, time: float, normalised: bool = False) -> Tensor:
    """u after `time` under u_t = -K, or -(K - mean K) when `normalised`, which keeps the area: (..., m) float64.

    A diffusion: a step is at most 2.5 min e^{2u} / |largest eigenvalue of the Laplacian|, and so short that no area
    element changes by more than 5 percent. A batch goes with its shortest step.

    Args:
        u: (..., m), smooth on the grid.

    Raises:
        ValueError: u does not fit the grid or is not finite.
        FlowSingularityError: the surface shrinks to a point before `time` (positive curvature, not normalised).
    """
    if u.shape[-1:] != surface.weights.shape or not bool(u.isfinite().all()):
        raise ValueError(f"u must be finite and (..., {len(surface.weights)}), got shape {tuple(u.shape)}")
    element = torch.exp(2 * u.double())
    total = surface.curvature * float(surface.weights.sum())  # 2 pi times the Euler characteristic
    _refuse_extinction(float((element.detach() @ surface.weights).min()), total, 0.0 if normalised else time)
    root = surface.weights.sqrt()
    stiffness = float(torch.linalg.matrix_norm(root[:, None] * surface.laplacian / root, 2))

    def rate(element: Tensor) -> Tensor:
        change = element.log() @ surface.laplacian.mT - 2 * surface.curvature
        if not normalised:
            return change
        return change + 2 * total / (element @ surface.weights)[..., None] * element

    def step_limit(element: Tensor, change: Tensor) -> float:
        fastest = float((change / element).abs().max())
        stable = _STABLE * float(element.min()) / stiffness
        return stable if fastest == 0 else min(stable, _CHANGE / fastest)

    return integrate(rate, element, time, step_limit).log() / 2


def _refuse_extinction(area: float, total: float, time: float) -> None:
    """Raise if a surface of this area and total curvature does not live for `time`: its area is A - 2 total t."""
    if time * 2 * total >= area:
        end = area / (2 * total)
        raise FlowSingularityError(f"the surface shrinks to a point at t = {end:.6g}: ask for less than {time}", end)
