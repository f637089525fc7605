"""Side by side: time several functions in one process, interleaved, and take medians."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one function: median, 20th and 80th percentile of `rounds` calls."""

    median: float
    p20: float
    p80: float
    rounds: int

    def divided(self, count: int) -> Timing:
        """The time of one of `count` steps of each call."""
        return Timing(self.median / count, self.p20 / count, self.p80 / count, self.rounds)


def interleaved(functions: Mapping[str, Callable[[], Any]], rounds: int = 5) -> dict[str, Timing]:
    """Call all functions once to warm up, then in turn, `rounds` times; the accelerator is waited for."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, function in functions.items():
                _wait()
                start = time.perf_counter()
                function()
                _wait()
                seconds[name].append(time.perf_counter() - start)
    finally:
        if enabled:
            gc.enable()
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(values: list[float]) -> Timing:
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    low, middle, high = (float(ordered.quantile(q)) for q in (0.2, 0.5, 0.8))
    return Timing(middle, low, high, len(values))


def _wait() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
