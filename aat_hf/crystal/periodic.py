"""Maps that repeat: structure factor and Bragg peaks of kept keys, Bloch bands of periodic attention.

What a user of attention gets: whether the keys a head keeps come in a period (table rows, lines of code, list items)
and which one (`bragg_peak`), and the spectrum of a periodic map of any length from one unit cell (`bloch_bands`).

Sources: N. Ashcroft and N. Mermin, *Solid State Physics* (1976), chapters 6 and 8; A. Guinier, *X-Ray Diffraction*
(1963), chapter 2 (structure factor); P. J. Davis, *Circulant Matrices* (1979), section 5.6 (block circulants).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.quantum._precision import real_dtype, widened


class BraggPeak(NamedTuple):
    """The first Bragg peak, all (...): wavenumber m (int64), period n / m, height S(m), score S(m) / (1 - density).

    Random keys have a score of about 1, and ln n at the most striking of all wavenumbers; a perfect comb has that of
    the number of kept keys and more.
    """

    wavenumber: Tensor
    period: Tensor
    height: Tensor
    score: Tensor


def structure_factor(weight: Tensor) -> Tensor:
    """S(m) = |sum_j w_j e^(2 pi i m j / n)|^2 / sum_j w_j^2 at m = 0 ... n // 2: (..., n) -> (..., n // 2 + 1).

    For kept keys (bool or 0 and 1) the divisor is their number N: S(0) = N, a comb of period P has peaks of height N at
    multiples of n / P and 0 elsewhere, random keys of density r have the mean 1 - r. 0 for no weight at all.
    """
    wide = widened(weight)
    transform = torch.fft.rfft(wide)
    size = wide.square().sum(-1, keepdim=True)
    power = transform.real.square() + transform.imag.square()
    return torch.where(size > 0, power / torch.where(size > 0, size, 1.0), 0.0).to(real_dtype(weight))


def structure_factor_at(positions: Tensor, wavevectors: Tensor) -> Tensor:
    """|sum_j e^(i kappa x_j)|^2 / N of points (..., N) at any wavevectors (K,), radians a token: (..., K)."""
    phase = widened(positions)[..., None, :] * widened(wavevectors)[:, None]
    power = phase.cos().sum(-1).square() + phase.sin().sum(-1).square()
    return (power / positions.shape[-1]).to(real_dtype(positions, wavevectors))


def bragg_peak(kept: Tensor, shortest: int = 2, longest: int | None = None) -> BraggPeak:
    """The first Bragg peak of kept keys (..., n) bool: the lowest wavenumber at a third of the highest or more.

    The lowest, because a comb has peaks at all multiples of its wavenumber; a third, because a peak between two
    wavenumbers keeps only (2 / pi)^2 of its height. Its neighbours belong to it: the local maximum is taken.

    Args:
        shortest, longest: periods looked for, in keys, longest n // 2 by default. A block of kept keys is a peak at
            long periods: set `longest` below twice its length.

    Raises:
        ValueError: no wavenumber has such a period.
    """
    n = kept.shape[-1]
    longest = n // 2 if longest is None else longest
    low, high = -(-n // max(longest, 1)), n // max(shortest, 1)
    if not 1 <= low <= high <= n // 2:
        raise ValueError(f"no wavenumber of {n} keys has a period between {shortest} and {longest}")
    factor = structure_factor(kept)[..., low : high + 1]
    strong = factor >= factor.amax(-1, keepdim=True) / 3
    first = strong.to(torch.uint8).argmax(-1, keepdim=True)
    count = torch.arange(factor.shape[-1], device=kept.device)
    falls = torch.nn.functional.pad(factor.diff(dim=-1) <= 0, (0, 1), value=True)
    top = (falls & (count >= first)).to(torch.uint8).argmax(-1, keepdim=True)
    height = factor.gather(-1, top)[..., 0]
    absent = 1 - kept.to(height).mean(-1)
    score = torch.where(absent > 0, height / torch.where(absent > 0, absent, 1.0), 0.0)
    wavenumber = top[..., 0] + low
    return BraggPeak(wavenumber, n / wavenumber, height, score)


def repetition(profile: Tensor) -> Tensor:
    """Share of the power of profiles (..., n) in the Bragg peaks of one period, less what noise has: (...) in [0, 1].

    The best period counts; entries of 0 are not seen. By Poisson summation it is the autocorrelation at the multiples
    of the period; at least three must fit.
    """
    seen = profile != 0
    count = seen.sum(-1, keepdim=True).to(profile)
    n = profile.shape[-1]
    power = torch.fft.rfft(profile, 2 * n).abs().square()
    correlation = torch.fft.irfft(power, 2 * n)[..., :n]
    lag, period = torch.arange(1, n, device=profile.device), torch.arange(2, max(3, n // 3 + 1), device=profile.device)
    comb = (lag % period[:, None] == 0).to(profile)
    whole = correlation[..., :1]
    noise = period / count.clamp(min=1)
    peaks = noise * (1 + 2 * (correlation[..., 1:] @ comb.mT) / torch.where(whole > 0, whole, 1.0))
    fraction = torch.where(noise <= 1 / 3, (peaks - noise) / (1 - noise.clamp(max=1 / 3)), 0.0)
    return torch.where(whole[..., 0] > 0, fraction.amax(-1).clamp(0, 1), 0.0)


def periodic_part(attention: Tensor, period: int) -> Tensor:
    """Blocks A_m, the mean over cells c of the block (c, c + m) of a map on a ring: (..., n, n) -> (..., cells, P, P).

    The nearest map with A(i + P, j + P) = A(i, j); that map itself when it has the period.

    Raises:
        ValueError: the period does not divide n.
    """
    n = attention.shape[-1]
    if n % period:
        raise ValueError(f"a period of {period} does not divide {n} positions")
    cells = n // period
    blocks = widened(attention).unflatten(-1, (cells, period)).unflatten(-3, (cells, period)).transpose(-3, -2)
    cell = torch.arange(cells, device=attention.device)
    to = (cell[:, None] + cell) % cells  # [c, m]: c + m
    return blocks[..., cell[:, None], to, :, :].mean(-4).to(real_dtype(attention))


def bloch_blocks(cell_blocks: Tensor) -> Tensor:
    """A(kappa) = sum_m A_m e^(i kappa m) at kappa = 2 pi l / cells, of blocks (..., cells, P, P): the same, complex.

    The attention on the ring is block diagonal in them.
    """
    return _wide_bloch_blocks(cell_blocks).to(real_dtype(cell_blocks).to_complex())


def bloch_bands(cell_blocks: Tensor) -> Tensor:
    """Eigenvalues of `bloch_blocks`: complex (..., cells, P), bands by modulus, descending.

    Together they are the spectrum of the map on the ring; rows that add up to 1 give the eigenvalue 1 at kappa = 0.
    For P = 1, the transform of the symbol.

    Each is an exact eigenvalue of a block changed by a few float64 roundings, e = 2e-16 times its norm (the QR
    algorithm is backward stable). A simple eigenvalue moves by e / |y^H x| under that, with x and y its right and left
    unit eigenvectors: by e itself for symmetric maps. One in a Jordan block of size k moves by up to e^(1/k), whatever
    the algorithm: z^k = e is the characteristic equation of the block with e in its corner. Sources: Golub & Van Loan,
    *Matrix Computations* (4th ed. 2013), sections 7.2.2, 7.2.3 and 7.5.6.
    """
    values = torch.linalg.eigvals(_wide_bloch_blocks(cell_blocks))
    values = values.gather(-1, values.abs().argsort(dim=-1, descending=True))
    return values.to(real_dtype(cell_blocks).to_complex())


def _wide_bloch_blocks(cell_blocks: Tensor) -> Tensor:
    # complex128, so that no rounding to the input's precision reaches eigenvalues that are sensitive to it.
    return torch.fft.ifft(widened(cell_blocks).to(torch.complex128), dim=-3, norm="forward")
