"""Running compiled loops on torch's number of threads, without the GIL and without oversubscription."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from aat_hf.kernels.cpu_team import team

_INLINE_WORK = 1 << 19  # multiply-adds below which a second thread brings nothing
_log = logging.getLogger("aat_hf")


def run(loop: Any, work: int, *arguments: Any) -> None:
    """Run a compiled loop on torch's number of threads, the caller's among them; `work` in multiply-adds."""
    if not loop.overloads:
        _compile(loop, arguments)
    counter = np.zeros(1, np.int64)
    count = torch.get_num_threads() if work >= _INLINE_WORK else 1
    if count == 1 or team.enter:
        loop(team.enter, count, counter, *arguments)
    else:
        _run_in_pool(count, partial(loop, 0, 1, counter, *arguments))


def _compile(loop: Any, arguments: tuple[Any, ...]) -> None:
    """Compile, or load from numba's cache, by a call that finds the queue empty; say so when it takes a while."""
    text = "compiling the CPU kernels (%s), 10 to 20 s, once: the result is cached in %s"
    start, done = time.process_time(), threading.Event()

    def tell() -> None:
        while not done.wait(0.5):
            if time.process_time() - start > 1.5:  # not by the clock: on a busy machine loading takes as long
                _log.warning(text, loop.py_func.__name__, loop.stats.cache_path)
                return

    threading.Thread(target=tell, daemon=True).start()
    try:
        loop(0, 1, np.full(1, 1 << 62), *arguments)
    finally:
        done.set()


def _run_in_pool(count: int, function: Callable[[], None]) -> None:
    futures = [_threads.submit(count, function) for _ in range(count - 1)]
    try:
        function()
    finally:
        for future in futures:
            if not future.cancel():  # a thread that never woke up is not waited for: the queue is empty
                future.result()


class _Threads:
    """Where torch has no `team`: a process-wide pool, as large as was ever asked for; a forked child starts anew."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.lock, self.size, self.pool = threading.Lock(), 0, ThreadPoolExecutor(1)

    def submit(self, count: int, function: Callable[[], None]) -> Future[None]:
        """Have `function` called by one of at least `count` threads."""
        with self.lock:
            if count > self.size:
                self.pool.shutdown(wait=False)  # what it runs is finished first
                self.size, self.pool = count, ThreadPoolExecutor(count, thread_name_prefix="aat_hf")
            return self.pool.submit(function)


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.reset)
