"""Torch's own threads under the compiled loops."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import njit

from aat_hf.kernels import cpu_threads
from aat_hf.kernels.cpu_matrices import entry
from aat_hf.kernels.cpu_team import Team, call_by_team
from aat_hf.kernels.simd import take_number

linux = pytest.mark.skipif(sys.platform != "linux", reason="torch may have another OpenMP library")
if sys.platform == "linux":
    thread_number = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).omp_get_thread_num
    thread_number.argtypes, thread_number.restype = [], ctypes.c_int


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@njit(nogil=True)
def note(seen, failing):
    seen[thread_number()] += 1
    if thread_number() == failing:
        raise ValueError


@njit(nogil=True)
def noted(enter, threads, seen, failing):
    return call_by_team(enter, threads, note, (seen, failing))


@entry
def count_to(counter, end, number):
    while take_number(counter.ctypes.data) < end:
        take_number(number.ctypes.data)


@entry
def fail(counter, number):
    if take_number(counter.ctypes.data) < 2:
        raise ValueError


@linux
def test_torch_for_linux_has_a_team():
    assert Team().enter


@linux
def test_every_thread_of_the_team_calls_once():
    seen = np.zeros(8, np.int64)
    assert not noted(Team().enter, 3, seen, -1)
    assert seen.tolist() == [1, 1, 1, 0, 0, 0, 0, 0]


def threads_of_this_process():
    return set(os.listdir("/proc/self/task"))


@linux
def test_they_are_the_threads_that_run_torch(two_threads):
    """Each thread that starts work has a pool of its own in OpenMP, so a new one sees its pool come into being."""
    seen, started = np.zeros(2, np.int64), []

    def start_torch_then_the_loop():
        before = threads_of_this_process()
        torch.ones(1 << 20).exp_()
        by_torch = threads_of_this_process()
        noted(Team().enter, 2, seen, -1)
        for _ in range(3):
            torch.ones(1 << 20).exp_()
            noted(Team().enter, 2, seen, -1)
        started.extend([by_torch - before, threads_of_this_process() - by_torch])

    thread = threading.Thread(target=start_torch_then_the_loop)
    thread.start()
    thread.join()
    assert [len(threads) for threads in started] == [1, 0]
    assert seen.tolist() == [4, 4]


@linux
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_in_any_thread_is_told(failing):
    seen = np.zeros(4, np.int64)
    assert noted(Team().enter, 4, seen, failing)
    assert seen.tolist() == [1] * 4


@linux
def test_a_loop_that_fails_raises_an_error(two_threads):
    with pytest.raises(MemoryError, match="a thread of the CPU kernels"):
        cpu_threads.run(fail, 1 << 30, np.zeros(1, np.int64))


@pytest.mark.parametrize("work", [1, 1 << 30])
def test_calls_at_once_from_several_threads_do_not_mix(two_threads, work):
    counts = [np.zeros(1, np.int64) for _ in range(4)]

    def call(i):
        for _ in range(50):
            cpu_threads.run(count_to, work, 1000, counts[i])

    threads = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(count[0]) for count in counts] == [50_000] * 4


def test_without_a_team_the_pool_runs_the_loop(two_threads, monkeypatch):
    team, count = Team(), np.zeros(1, np.int64)
    team.leave()
    monkeypatch.setattr(cpu_threads, "team", team)
    pooled = []
    monkeypatch.setattr(cpu_threads, "_run_in_pool", lambda *a, run=cpu_threads._run_in_pool: pooled.append(run(*a)))
    cpu_threads.run(count_to, 1 << 30, 1000, count)
    assert count[0] == 1000 and len(pooled) == 1
