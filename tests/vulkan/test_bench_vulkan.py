"""`aat bench vulkan`: its numbers come from counters, and it refuses to print wrong ones."""

from __future__ import annotations

import argparse
import signal

import pytest
import torch
from tiny_model import save_tiny

from aat_hf.bench import _vulkan_attention, _vulkan_model
from aat_hf.bench import vulkan as bench
from aat_hf.bench.attention import NumericalError
from aat_hf.kernels import vulkan as kernel
from aat_hf.vulkan import limits, plain
from aat_hf.vulkan import provider as providers
from aat_hf.vulkan.buffers import PoolStatistics
from aat_hf.vulkan.lowering import read_rows, room
from aat_hf.vulkan.pipelines import CacheStatistics
from aat_hf.vulkan.workspace import Workspace

pytestmark = pytest.mark.vulkan


@pytest.fixture
def one(provider, monkeypatch):
    """Every part of the benchmark gets the provider under test."""
    for module in (bench, kernel, providers):
        monkeypatch.setattr(module, "get_provider", lambda: provider)
    compiled = CacheStatistics(misses=3, miss_seconds=0.003, slowest_miss_seconds=0.002)
    monkeypatch.setattr(_vulkan_model, "_pipelines_of_a_process", lambda *_: compiled)  # takes seconds
    return provider


ONE_OF_EACH = pytest.mark.parametrize("provider", ["copies"], indirect=True)


@ONE_OF_EACH
def test_tables(one, tmp_path, capsys):
    out = tmp_path / "attention.csv"
    sizes = ["--sizes", "16", "--batch", "2", "--rounds", "1", "--lengths", "64", "--densities", "1", "--heads", "1"]
    model = ["--steps", "4", "--step-lengths", "140", "180", "--model", save_tiny(tmp_path)]
    assert bench.main([*sizes, "--head-dim", "8", *model, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for line in (
        "pool: hit rate",
        "pool: external fragmentation",
        "mean 1.00, slowest 2.00 ms (3)",
        "| matmul | 16² |",
    ):
        assert line in shown
    assert shown.count("| 64 | 1.000 |") == 2 and "| 64 | 4 |" in shown and "| copy in ms |" in shown
    assert out.read_text().count("\n") == 2


@ONE_OF_EACH
def test_an_interrupted_model_is_counted_as_far_as_it_went(one, tmp_path, monkeypatch, capsys):
    step, steps = _vulkan_model._step, iter((None, None, signal.SIGTERM))
    monkeypatch.setattr(
        _vulkan_model,
        "_step",
        lambda *a, **k: signal.raise_signal(told) if (told := next(steps)) else step(*a, **k),
    )
    before = signal.getsignal(signal.SIGTERM)
    model = ["--steps", "9", "--step-lengths", "140", "180", "--model", save_tiny(tmp_path)]
    assert bench.main([*model, "--lengths", "64"]) == 130
    shown = capsys.readouterr().out
    assert "| 2, interrupted |" in shown and "pool: hit rate" in shown and "TFLOP/s" not in shown
    assert signal.getsignal(signal.SIGTERM) is before


def test_repeated_dispatches_do_not_wait_for_each_other(provider):
    a = torch.randn(8)
    with Workspace(provider) as work:
        source, result = work.buffers(a, room((8,)))
        relu = plain.elementwise_dispatch(provider, "relu", source, source, result, 8)
        many = _vulkan_attention.independent(work, relu, 2, 3)
        assert [len(batch) for batch in limits.batches([relu] * 3)] == [1, 1, 1]
        assert [len(batch) for batch in limits.batches(many)] == [3]
        work.run(*many, fetch=tuple(dispatch.buffers[-1] for dispatch in many))
        for dispatch in many:
            assert torch.equal(read_rows(dispatch.buffers[-1], torch.empty(a.shape)), a.relu())


@ONE_OF_EACH
def test_a_model_that_computes_wrongly_is_not_reported(one, tmp_path, monkeypatch):
    right = kernel.vulkan_attention
    monkeypatch.setattr(kernel, "vulkan_attention", lambda *a: (1.01 * right(*a)[0], right(*a)[1]))
    arguments = argparse.Namespace(steps=2, step_lengths=[140, 180], model=save_tiny(tmp_path))
    with pytest.raises(NumericalError, match="differ from the CPU kernel"):
        _vulkan_model.measure(one, arguments)


def test_growth_is_told_by_quarters():
    assert _vulkan_model._by_time([float(step) for step in range(8)]) == (0.0, 3.0, 7.0)
    assert _vulkan_model._by_time([None] * 8) is None


def test_the_table_names_targets():
    pool = PoolStatistics(hits=95, misses=5, handed_total=4, requested_total=3, idle_at_misses=1, held_at_misses=200)
    found = _vulkan_model.table(
        _vulkan_model.Run(
            8, False, 0.1, 0.2, pool, CacheStatistics(), (1.0, 2.0, 2.0), CacheStatistics(), CacheStatistics()
        )
    )
    for cells in ("95.00% | ≥ 90 % |", "25.00% |", "0.500% | < 1 % |", "2.0 MiB | ≤ 2.0 MiB |"):
        assert cells in found


@ONE_OF_EACH
def test_another_process_has_its_own_driver_cache(provider, tmp_path, monkeypatch):
    (tmp_path / "compiled").touch()
    told = "{'misses': len(os.listdir(os.environ['MESA_SHADER_CACHE_DIR'])), 'hits': int(sys.argv[1])}"
    monkeypatch.setattr(_vulkan_model, "_COMPILE", f"import json, os, sys; print('...'); print(json.dumps({told}))")
    assert _vulkan_model._pipelines_of_a_process(provider, 8, tmp_path) == CacheStatistics(hits=8, misses=1)


def test_attention_of_a_process(one, capsys):
    _vulkan_model.compile_attention(8)
    assert '"misses"' in capsys.readouterr().out and torch.is_grad_enabled()
