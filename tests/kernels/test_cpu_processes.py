"""The CPU kernel in threads, forked children and new processes, and numba's cache."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import CPU, inputs, random_map

from aat_hf.kernels import cpu
from aat_hf.kernels.cpu import cpu_attention, tiled_forward
from aat_hf.kernels.lowered_tiles import lower_tiles
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.tile_map import TileMap

PACKAGE = Path(cpu.__file__).parents[2]


def run(q, k, v, tile_map, mask):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    output, lse = cpu_attention(*leaves, tile_map, mask, 0.2)
    return output.detach(), lse.detach(), *torch.autograd.grad(output.square().sum() + lse.sin().sum(), leaves)


def test_results_are_bit_equal_for_every_thread_count():
    mask = causal_mask(700, 700, CPU)
    case = (*inputs(1, 4, 2, 700, 700, 40), random_map(mask, 1, 4, 64, 64, 0.5), mask)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5, 1, 2):
            torch.set_num_threads(threads)
            results.append(run(*case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_four_threads_at_once():
    mask = causal_mask(500, 500, CPU)
    cases = [(*inputs(1, 2, 2, 500, 500, 32), random_map(mask, 1, 2, 64, 64, 0.7), mask) for _ in range(4)]
    expected, found = [run(*case) for case in cases], [None] * 4

    def work(i):
        for _ in range(5):
            found[i] = run(*cases[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_threads_of_its_own():
    mask = causal_mask(600, 600, CPU)
    case = (*(x.detach() for x in inputs(1, 4, 4, 600, 600, 32)), TileMap.dense(mask, 1, 4, 64, 64), mask, 0.2)
    expected, _ = cpu_attention(*case)  # the parent's threads exist now
    lowered = lower_tiles(*case[3:5])
    child = os.fork()
    if child == 0:  # nothing but the kernel: torch's own threads do not survive a fork
        signal.alarm(20)
        output = tiled_forward(*case[:3], *lowered, 64, 64, 0.2, None, float("-inf"))[0]
        os._exit(0 if (output.numpy() == expected.numpy()).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


SCRIPT = """
    import logging, sys, time
    logging.basicConfig(level=logging.WARNING, format="LOG %(message)s", stream=sys.stdout)
    import torch
    from aat_hf.kernels import cpu_forward, simd_emit
    from aat_hf.kernels.cpu import cpu_attention
    from aat_hf.kernels.reference import reference_attention
    from aat_hf.tiling.masks import causal_mask
    from aat_hf.tiling.tile_map import TileMap
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 150, 20, requires_grad=True) for _ in range(3))
    mask = causal_mask(150, 150, q.device)
    start = time.process_time()
    output, _ = cpu_attention(q, k, v, TileMap.dense(mask, 1, 2, 32, 32), mask, 0.3)
    {backward}
    allowed = mask.rows(torch.arange(150))
    expected = reference_attention(q.double(), k.double(), v.double(), allowed, 0.3)[0]
    assert (output - expected).norm() / expected.norm() < 1e-6
    print("lanes", simd_emit.LANES, "hits", sum(cpu_forward.forward.stats.cache_hits.values()),
          "seconds", time.process_time() - start)
"""


def process(backward="", **environment):
    script = textwrap.dedent(SCRIPT).replace("{backward}", backward)
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE), **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
SSE = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2"} if X86 else {}
AVX2 = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+bmi2"} if X86 else {}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What three new processes print: compiling for narrow vectors, the same again, without a place for the cache."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("cache")), **SSE}
    # Of all places numba may know this one only exists inside IPython: as where nothing can be written.
    nowhere = {"NUMBA_CACHE_LOCATOR_CLASSES": "IPythonCacheLocator", "NUMBA_CACHE_DIR": "", **AVX2}
    with ThreadPoolExecutor(2) as pool:  # compiling takes a while: at the same time
        cold = pool.submit(process, "torch.autograd.grad(output.sum(), (q, k, v))", **cache)
        uncached = pool.submit(process, **nowhere)
        return cold.result(), process(**cache), uncached.result()


def test_second_process_loads_the_cache_of_its_own_vector_width(processes):
    first, second, _ = processes
    assert "LOG compiling the CPU kernels" in first and "hits 0" in first
    assert "hits 1" in second and "LOG" not in second
    assert not X86 or "lanes 4 " in second


def test_without_a_place_for_the_cache_it_compiles_and_says_so(processes):
    assert "LOG every process will compile the CPU kernels anew, set NUMBA_CACHE_DIR" in processes[2]
    assert "hits 0" in processes[2]
    assert not X86 or "lanes 8 " in processes[2]
