"""The tolerance over the course of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

from aat_hf.config import AATConfig

Curve = str | Callable[[float], float]
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: progress,
    "cosine": lambda progress: (1 - math.cos(math.pi * progress)) / 2,
}


class ToleranceSchedule:
    """From `start` to `tolerance`, or any function.

    Args:
        tolerance: the last tolerance.
        start: the first one ("linear" and "cosine").
        curve: "constant", "linear", "cosine", or a function of the progress in [0, 1] that gives the tolerance itself,
            or the name "package.module:function" of one.

    Raises:
        ValueError: an unknown curve, or one that lacks its tolerances or has too many.
    """

    def __init__(self, tolerance: float | None = None, start: float | None = None, curve: Curve = "constant") -> None:
        self._function = None if curve in _SHAPES else _load(curve)
        if self._function is not None:
            wanted, right = "no start and no tolerance", start is None and tolerance is None
        elif curve == "constant":
            wanted, right = "a tolerance or none, and no start", start is None
        else:
            wanted, right = "start and tolerance", start is not None and tolerance is not None
        if not right:
            raise ValueError(f"schedule {curve!r} takes {wanted}: got start = {start}, tolerance = {tolerance}")
        for value in (tolerance, start):
            if value is not None:
                AATConfig(tolerance=value)
        self.tolerance, self.start, self.curve = tolerance, start, curve

    @property
    def name(self) -> str:
        """The curve as a string, which the constructor takes in turn if the function has a name in a module."""
        if isinstance(self.curve, str):
            return self.curve
        return f"{self.curve.__module__}:{getattr(self.curve, '__qualname__', type(self.curve).__qualname__)}"

    def at(self, progress: float) -> float | None:
        """The tolerance after this share of the training, to four digits; None: the model's own."""
        if self._function is not None:
            value = self._function(progress)
        elif self.tolerance is None:
            return None
        else:
            first = self.tolerance if self.start is None else self.start
            value = first + (self.tolerance - first) * _SHAPES[str(self.curve)](progress)
        return float(f"{value:.4g}")


def _load(curve: Curve) -> Callable[[float], float]:
    if not isinstance(curve, str):
        return curve
    module, _, name = curve.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"schedule = {curve!r}: must be {', '.join(map(repr, _SHAPES))}, a function, or the name "
            f"package.module:function of one that can be imported (a lambda cannot)"
        ) from error
    if not callable(found):
        raise ValueError(f"schedule = {curve!r}: is {type(found).__name__}, must be a function")
    return found
