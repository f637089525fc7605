"""How far predictions of tile masses are trusted, head by head, learnt from decoding steps that are measured.

A head's margin multiplies the mass that its unread tiles are predicted to have. After each measured step its
logarithm moves by RATE * (lost / tolerance - 1): the recursion of adaptive conformal inference (Gibbs & Candes 2021,
Adaptive Conformal Inference Under Distribution Shift, eq. 2). Whatever the losses are, their mean is
tolerance * (1 + (change of the logarithm) / (RATE * measured steps)), and less where the lower bound was met.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

RATE = 0.25
_START = 1.0
_BOUNDS = -4.0, 8.0  # of the logarithm: below, other heads of the group choose the tiles; above, nearly all are read
_OFTEN, _EVERY = 4, 17  # the first steps are measured, then one in so many; a prime: layers that share keys take turns
_RECENT = 8  # measured steps that `expected` remembers


class Margins:
    """The margins of all heads, and the loss to be expected of a step that is not measured.

    Attributes:
        log: (batch * heads,) float64, logarithms of the margins.
        expected: (batch * heads,) float64, running mean of the measured losses.
        steps: decoding steps so far.
    """

    def __init__(self) -> None:
        self._begin(0, 0)

    def next_step(self, batch: int, heads: int) -> bool:
        """Count a decoding step of `batch` entries of `heads` heads; whether it is to be measured."""
        if (batch, batch * heads) != (self._batch, len(self.log)):
            self._begin(batch, heads)
        self.steps += 1
        return self.steps <= _OFTEN or self.steps % _EVERY == 0

    def _begin(self, batch: int, heads: int) -> None:
        self.log: NDArray[np.float64] = np.full(batch * heads, _START)
        self.expected: NDArray[np.float64] = np.zeros(batch * heads)
        self.steps, self._measured, self._batch = 0, 0, batch

    def learn(self, lost: NDArray[np.float64], tolerance: float) -> None:
        """Move the margins by a measured step.

        Args:
            lost: (batch * heads,) probability lost, NaN where a query sees no key.
        """
        known = np.isfinite(lost)
        self._measured += 1
        share = 1 / min(self._measured, _RECENT)
        self.expected[known] += share * (lost[known] - self.expected[known])
        self._move(known, lost, tolerance)

    def learn_exact(self, tolerance: float) -> None:
        """Move the margins by a step that was to be measured, but lost nothing because it became exact."""
        self._move(np.ones(self.log.shape, np.bool_), np.zeros(self.log.shape), tolerance)

    def _move(self, known: NDArray[np.bool_], lost: NDArray[np.float64], tolerance: float) -> None:
        self.log[known] = np.clip(self.log[known] + RATE * (lost[known] / tolerance - 1), *_BOUNDS)

    def select(self, index: Tensor) -> None:
        """Keep the batch entries `index` (batch',), in that order."""
        if not self._batch:  # no step yet
            return
        entries = index.cpu().numpy()
        self.log, self.expected = (x.reshape(self._batch, -1)[entries].reshape(-1) for x in (self.log, self.expected))
        self._batch = len(entries)
