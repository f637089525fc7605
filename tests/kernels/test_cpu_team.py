"""Torch's own threads under the compiled loops."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch

from aat_hf.kernels import cpu_threads
from aat_hf.kernels.cpu_team import Team

linux = pytest.mark.skipif(sys.platform != "linux", reason="torch may have another OpenMP library")


@linux
def test_torch_for_linux_has_a_team():
    assert Team().available


@linux
def test_every_thread_of_the_team_calls_once_and_the_caller_is_one():
    meet, names = threading.Barrier(3, timeout=20), set()

    def body():
        meet.wait()  # passes only if three threads are here at once
        names.add(threading.get_ident())

    Team().run(3, body)
    assert len(names) == 3 and threading.get_ident() in names


@linux
def test_they_are_the_threads_that_run_torch():
    seen, team, before = [], Team(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        team.run(2, lambda: seen.append(threading.get_native_id()))
        threads = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            torch.ones(1 << 20).exp_()
            team.run(2, lambda: seen.append(threading.get_native_id()))
        assert len(os.listdir("/proc/self/task")) == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(seen)) == 2


@linux
def test_an_error_in_any_thread_is_raised():
    caller = threading.get_ident()

    def fails(here: bool):
        if (threading.get_ident() == caller) == here:
            raise KeyError("of this thread")

    for here in (True, False):
        with pytest.raises(KeyError, match="of this thread"):
            Team().run(2, lambda here=here: fails(here))


@linux
def test_calls_at_once_from_several_threads_do_not_mix():
    team, counts = Team(), [0] * 4

    def work(i):
        def body():
            counts[i] += 1  # by two threads; the GIL is not given up in between

        for _ in range(50):
            team.run(2, body)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [100] * 4


def test_without_a_team_the_pool_runs_the_loop(monkeypatch):
    team = Team()
    team.leave()
    monkeypatch.setattr(cpu_threads, "team", team)
    done = []

    class Loop:
        overloads = True

        def __call__(self, counter, value):
            done.append((threading.current_thread().name, value))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        cpu_threads.run(Loop(), 1 << 30, 7)
    finally:
        torch.set_num_threads(before)
    assert done and all(value == 7 for _, value in done)
