"""Torch's own OpenMP threads, for compiled loops: they are awake when torch has just used them.

GNU OpenMP's threads wait for work in a loop, for milliseconds: a second pool would share its cores with them. Torch
does not export its pool to Python, but it is that of the OpenMP library that torch is linked with, and a parallel
region entered from the thread that calls torch is run by the threads that run torch's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SUFFIXES = (".so", ".dylib")
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Job:
    """A function that all threads of a team call, and the first error that one of them met."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function
        self.error: BaseException | None = None

    def __call__(self) -> None:
        try:
            self.function()
        except BaseException as error:  # it cannot pass through OpenMP
            self.error = error


class Team:
    """Threads of torch's OpenMP library.

    A forked child does not have its parent's threads, and GNU OpenMP does not know: `available` is False there.
    """

    def __init__(self) -> None:
        self._enter = _parallel_region()
        self._jobs: dict[int, _Job] = {}
        self._numbers = itertools.count(1)
        self._body = _Body(lambda number: self._jobs[number]())

    @property
    def available(self) -> bool:
        """Whether torch runs on such threads, and they are this process's."""
        return self._enter is not None

    def leave(self) -> None:
        """Never enter a parallel region again."""
        self._enter = None

    def run(self, count: int, function: Callable[[], None]) -> None:
        """Have `function` called by `count` threads, this one among them, and wait for them."""
        assert self._enter is not None
        job, number = _Job(function), next(self._numbers)
        self._jobs[number] = job
        try:
            self._enter(self._body, number, count, 0)
        finally:
            del self._jobs[number]
        if job.error is not None:
            raise job.error


def _parallel_region() -> Any:
    """`GOMP_parallel(body, data, threads, flags)` of the library torch is linked with; None: there is none."""
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    found = [p for p in Path(torch.__file__).parent.joinpath("lib").glob("libtorch_cpu.*") if p.suffix in _SUFFIXES]
    try:
        enter = ctypes.CDLL(str(found[0])).GOMP_parallel  # looked up in what it is linked with, too
    except (OSError, AttributeError, IndexError):
        return None
    enter.argtypes, enter.restype = [_Body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return enter


team = Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=team.leave)
