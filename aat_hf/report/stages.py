"""Milliseconds by stage of one attention call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_UNTIMED = nullcontext()
timing = False
"""Whether stages are timed (on CUDA that synchronises); `aat_hf.record` turns it on."""


class Stages:
    """`with stages("select"): ...` adds up the milliseconds of each name while `timing` is on."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: dict[str, float] = {}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Time the block under `name`."""
        return self._timed(name) if timing else _UNTIMED

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._times[name] = self._times.get(name, 0.0) + self._now() - start

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds by stage; empty when timing is off."""
        return self._times

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3
