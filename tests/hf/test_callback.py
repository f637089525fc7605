"""`AATCallback`: where its numbers arrive, whether they are right, schedule, resuming, warnings."""

from __future__ import annotations

import json
import logging
import math
import sys
from types import ModuleType

import pytest
import torch
from training import SMALL, Copies, arguments, classifier, language_model, losses, trainer
from transformers import TrainerCallback

import aat_hf
from aat_hf import AATCallback
from aat_hf.hf.collector import Collector, LayerSums, merge, model_metrics
from aat_hf.hf.schedule import ToleranceSchedule
from aat_hf.report.record import listen

pytestmark = pytest.mark.usefixtures("one_thread")
ALWAYS = {
    "aat_density", "aat_density_p10", "aat_density_p90", "aat_infidelity", "aat_infidelity_ci",
    "aat_heads_over_tolerance", "aat_tiled_calls", "aat_skip_calls", "aat_dense_calls", "aat_router_dense_calls",
    "aat_tiles_exact", "aat_tiles_coarse", "aat_tiles_culled", "aat_tolerance", "aat_tokens_per_second",
    "aat_peak_memory_mib", "aat_ms_select", "aat_ms_compute", "aat_ms_audit",
}  # fmt: skip


def logged(trained):
    return [entry for entry in trained.state.log_history if "loss" in entry]


class Reporter(TrainerCallback):
    """Stands where TensorBoard and W&B do: before the user's callbacks."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_numbers_reach_reporters_history_and_the_saved_state(tmp_path):
    reporter = Reporter()
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, eval_strategy="steps", eval_steps=4)
    trained = trainer(language_model(), args, [AATCallback()], eval_dataset=Copies(4))
    trained.callback_handler.callbacks.insert(1, reporter)
    trained.train()
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    for entries in (logged(trained), [e for e in stored if "loss" in e], [e for e in reporter.seen if "loss" in e]):
        assert len(entries) >= 2
        for entry in entries:
            assert set(entry) >= ALWAYS
            assert all(type(entry[name]) in (int, float) and math.isfinite(entry[name]) for name in ALWAYS)
    evaluated = [entry for entry in reporter.seen if "eval_loss" in entry]
    assert evaluated and all(0 < entry["eval_aat_density"] <= 1 for entry in evaluated)
    assert not any("aat_density" in entry for entry in evaluated)


def test_tensorboard_has_them(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trained = trainer(language_model(), arguments(tmp_path, report_to=["tensorboard"]), [AATCallback()])
    trained.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    for name in ALWAYS:
        scalars = events.Scalars(f"train/{name}")
        assert [s.step for s in scalars] == [2, 4, 6]
        assert scalars[-1].value == pytest.approx(logged(trained)[-1][name], rel=1e-6)


def test_numbers_are_those_of_a_recorded_pass(tmp_path):
    model = language_model()
    args = arguments(tmp_path, max_steps=1, logging_steps=1, learning_rate=0.0)
    trained = trainer(model, args, [AATCallback(layer_steps=1, observables=["entropy", "effective_rank"])])
    batch = next(iter(trained.get_train_dataloader()))
    trained.train()
    found = logged(trained)[0]
    with aat_hf.record(model) as report:
        model.train()(**batch)
    heads = torch.cat([layer.density for layer in report.layers])
    assert 0 < report.density < 0.95
    assert found["aat_density"] == pytest.approx(report.density, rel=1e-5)
    assert found["aat_density_p90"] == pytest.approx(float(heads.quantile(0.9)), rel=1e-5)
    assert found["aat_tiles_exact"] == pytest.approx(report.density, rel=1e-5)
    mean, half_width = report.infidelity
    assert found["aat_infidelity"] == pytest.approx(mean, rel=1e-3)
    assert found["aat_infidelity_ci"] == pytest.approx(half_width, rel=1e-3)
    over = torch.cat([layer.infidelity_mean for layer in report.layers]) > SMALL["tolerance"]
    assert found["aat_heads_over_tolerance"] == float(over.float().mean())
    for layer in report.layers:
        assert found[f"aat_layer{layer.layer_idx}_density"] == pytest.approx(float(layer.density.mean()), rel=1e-5)
        assert f"aat_layer{layer.layer_idx}_infidelity" in found
    with torch.no_grad():
        attention = model(**batch, output_attentions=True).attentions
    entropy = torch.stack([torch.special.entr(a).sum(-1).mean() for a in attention]).mean()
    assert found["aat_entropy"] == pytest.approx(float(entropy), rel=0.05)  # 32 of 160 rows
    assert 1 <= found["aat_effective_rank"] <= 32


def test_dense_calls_are_counted_and_warned_of_nothing(tmp_path):
    trained = trainer(language_model(tolerance=0.0), arguments(tmp_path, max_steps=2), [AATCallback()])
    trained.train()
    found = logged(trained)[0]
    assert (found["aat_dense_calls"], found["aat_density"]) == (1.0, 1.0)
    assert "aat_infidelity" not in found and "aat_tiles_exact" not in found


def test_another_implementation_is_pointed_out(tmp_path, caplog):
    trained = trainer(language_model("sdpa"), arguments(tmp_path, max_steps=2), [AATCallback()])
    with caplog.at_level(logging.WARNING, "aat_hf"):
        trained.train()
    assert 'attends with "aat": AATCallback logs speed and memory' in caplog.text
    assert "aat_peak_memory_mib" in logged(trained)[0] and "aat_density" not in logged(trained)[0]


def test_a_torch_that_cannot_compile_tiles_is_pointed_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("aat_hf.hf.operator.SUPPORTED", False)
    args = arguments(tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    trained = trainer(language_model(), args, [AATCallback()])
    torch._dynamo.reset()
    with caplog.at_level(logging.WARNING, "aat_hf"):
        trained.train()
    torch._dynamo.reset()
    assert "compiles exact attention; tiles in a compiled model need torch 2.13" in caplog.text
    assert "aat_peak_memory_mib" in logged(trained)[0] and "aat_density" not in logged(trained)[0]


def test_only_sampled_micro_batches_are_audited(tmp_path, monkeypatch):
    audits = []
    from aat_hf import attention

    audit = attention._audit
    monkeypatch.setattr(attention, "_audit", lambda *a: audits.append(1) or audit(*a))
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    trainer(language_model(), args, [AATCallback(sample_steps=3)]).train()
    assert len(audits) == 2 * 2  # steps 3 and 6, two layers, one of three micro-batches


def test_tokens_are_counted_across_micro_batches(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("aat_hf.hf.callback.time.perf_counter", lambda: float(next(clock)))
    for include in ("no", "all"):
        args = arguments(tmp_path, max_steps=2, gradient_accumulation_steps=3, include_num_input_tokens_seen=include)
        trained = trainer(language_model(), args, [AATCallback(timing=False)])
        trained.train()
        assert logged(trained)[0]["aat_tokens_per_second"] == pytest.approx(3 * 2 * 160, rel=0.01)  # 1 s a step


def test_evaluation_outside_training(tmp_path):
    trained = trainer(
        language_model(), arguments(tmp_path, per_device_eval_batch_size=2), [AATCallback()], eval_dataset=Copies(6)
    )
    found = trained.evaluate()
    assert found["eval_aat_dense_calls"] == 0 and 0 < found["eval_aat_density"] <= 1
    trained.predict(Copies(6))
    assert set(trained.evaluate()) == set(found)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (dict(), [None, None, None]),
        (dict(tolerance=0.1), [0.1, 0.1, 0.1]),
        (dict(start=0.3, tolerance=0.1, curve="linear"), [0.3, 0.2, 0.1]),
        (dict(start=0.3, tolerance=0.1, curve="cosine"), [0.3, 0.2, 0.1]),
        (dict(curve=lambda progress: 0.1 + progress / 3), [0.1, 0.2667, 0.4333]),
        (dict(curve="training:quadratic"), [0.0, 0.05, 0.2]),
    ],
)
def test_schedules(how, expected):
    schedule = ToleranceSchedule(**how)
    assert [schedule.at(progress) for progress in (0.0, 0.5, 1.0)] == expected


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(schedule="linear", tolerance=0.1), "takes start and tolerance"),
        (dict(start=0.1), "takes a tolerance or none, and no start"),
        (dict(schedule=math.sqrt, tolerance=0.1), "takes no start and no tolerance"),
        (dict(schedule="parabolic"), "must be 'constant', 'linear', 'cosine', a function"),
        (dict(schedule="training:LENGTH"), "is int, must be a function"),
        (dict(tolerance=1.5), r"AATConfig.tolerance = 1.5"),
        (dict(patience=0), "patience = 0: must be a positive integer"),
        (dict(observables=["colour"]), "must be of entropy, effective_rank"),
    ],
)
def test_wrong_arguments(how, message):
    with pytest.raises(ValueError, match=message):
        AATCallback(**how)


def test_tolerance_follows_its_schedule(tmp_path):
    callback = AATCallback(schedule="linear", start=0.3, tolerance=0.0)
    trained = trainer(language_model(), arguments(tmp_path, logging_steps=1), [callback])
    trained.train()
    assert [e["aat_tolerance"] for e in logged(trained)] == pytest.approx([0.3, 0.25, 0.2, 0.15, 0.1, 0.05])
    assert trained.model.config.aat["query_tile"] == SMALL["query_tile"]


@pytest.mark.parametrize("restore", [False, True])
def test_resuming_continues_schedule_counters_and_losses(tmp_path, restore):
    def run(resume=None, **changes):
        callback = AATCallback(schedule="training:quadratic", patience=2)
        args = arguments(
            tmp_path, logging_steps=1, save_strategy="steps", save_steps=3, **changes,
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        trained = trainer(language_model(), args, [callback])
        if resume is None:
            callback.misses = {"a": 2}
        trained.train(resume_from_checkpoint=resume)
        return trained, next(cb for cb in trained.callback_handler.callbacks if isinstance(cb, AATCallback))

    whole, _ = run()
    resumed, callback = run(str(tmp_path / "checkpoint-3"))
    assert callback.misses["a"] == 2
    assert losses(resumed) == losses(whole)
    tolerances = [[e["aat_tolerance"] for e in logged(t)] for t in (resumed, whole)]
    assert tolerances[0] == tolerances[1] and len(set(tolerances[0])) == 6
    assert [e["aat_density"] for e in logged(resumed)] == [e["aat_density"] for e in logged(whole)]


def sums(mean, rows=10, tolerance=0.1):
    spread = 0.01
    squares = rows * mean**2 + (rows - 1) * spread**2
    return LayerSums("layer", 0, tolerance, {
        "calls": [1.0], "tokens": [8.0], "density": [0.5, 0.5], "path/tiled": [1.0], "router": [0.0],
        "rows": [rows, rows], "infidelity": [rows * mean, 0.0], "infidelity_squared": [squares, 0.0],
    })  # fmt: skip


def test_sums_of_processes_give_the_statistics_of_all_rows():
    draw = torch.rand(2, 2, 7, dtype=torch.float64)  # processes, heads, rows
    processes = []
    for part in draw:
        one = sums(0.0)
        one.sums.update(
            rows=[7.0, 7.0], infidelity=part.sum(-1).tolist(), infidelity_squared=part.square().sum(-1).tolist()
        )
        processes.append([one])
    rows = draw.transpose(0, 1).flatten(1)
    width = 1.959964 * rows.std(-1) / math.sqrt(14)
    for (mean, half_width), row, expected in zip(merge(processes)[0].infidelity(), rows, width, strict=True):
        assert (mean, half_width) == pytest.approx((float(row.mean()), float(expected)), rel=1e-6)
    assert model_metrics([]) == {}


def test_a_head_that_keeps_missing_its_tolerance_is_named(tmp_path, caplog):
    callback = AATCallback(patience=3)
    state = trainer(language_model(), arguments(tmp_path)).state
    with caplog.at_level(logging.WARNING, "aat_hf"):
        for mean in (0.3, 0.3, 0.101, 0.3, 0.3):  # 0.101 is not over 0.1 by more than chance
            callback._warn([sums(mean)], state)
        assert not caplog.records
        for _ in range(3):
            callback._warn([sums(0.3)], state)
    assert len(caplog.records) == 1  # once for a row of misses
    assert "head 0 of layer lost 0.300" in caplog.text and "layers={0: {'mode': 'dense'}}" in caplog.text


def test_vulkan_reports_where_it_is_loaded(tmp_path, monkeypatch):
    workspace = ModuleType("aat_hf.vulkan.workspace")
    workspace.rates = lambda: {"pool_hit_rate": 0.75}
    monkeypatch.setitem(sys.modules, "aat_hf.vulkan.workspace", workspace)
    trained = trainer(language_model(), arguments(tmp_path, max_steps=2), [AATCallback()])
    trained.train()
    assert logged(trained)[0]["aat_vulkan_pool_hit_rate"] == 0.75


def test_a_collector_is_told_nothing_when_it_does_not_listen():
    model = classifier()
    collector = Collector(model)
    listen(collector)
    batch = {"input_ids": Copies(2).ids}
    model(**batch)
    assert collector.empty
    collector.start()
    model(**batch)
    collector.stop()
    model(**batch)
    layers = collector.drain()
    assert [layer.sums["calls"] for layer in layers] == [[1.0], [1.0]] and collector.empty
