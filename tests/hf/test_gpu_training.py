"""Fine-tuning with the Trainer on a GPU: what `test_training.py` asks of a CPU, and all of it at once."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers as tf
from training import Copies, arguments, classifier, language_model, losses, trainer

from aat_hf import AATCallback
from aat_hf.hf import operator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
FIELDS = {field.name for field in dataclasses.fields(tf.TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
MEASURED = {"aat_density", "aat_tiled_calls", "aat_infidelity", "aat_ms_select", "aat_ms_compute"}


def train(model, folder, how=(), **changes):
    """The Trainer, its losses and its last log."""
    trained = trainer(model, arguments(folder, use_cpu=False, **changes), [AATCallback()], **dict(how))
    trained.train()
    assert all(parameter.is_cuda for parameter in trained.model.parameters())
    found = losses(trained)
    assert all(torch.isfinite(torch.tensor(found)))
    return trained, found, [entry for entry in trained.state.log_history if "loss" in entry][-1]


def test_zero_tolerance_trains_as_sdpa_does(tmp_path):
    _, aat, _ = train(language_model("aat", tolerance=0.0), tmp_path, max_steps=50, logging_steps=1)
    _, sdpa, _ = train(language_model("sdpa"), tmp_path, max_steps=50, logging_steps=1)
    assert len(aat) == 50 and aat[-1] < aat[0] - 0.3
    assert aat == pytest.approx(sdpa, rel=2e-5)


@pytest.mark.parametrize("geometry", ["euclidean", "hyperbolic"])
def test_tiled_training_learns(geometry, tmp_path):
    settings = dict(geometry=geometry, learn_curvature=geometry != "euclidean")
    _, found, entry = train(language_model(**settings), tmp_path, max_steps=30, logging_steps=10)
    _, exact, _ = train(language_model(**settings, tolerance=0.0), tmp_path, max_steps=30, logging_steps=10)
    assert set(entry) >= MEASURED
    assert entry["aat_peak_memory_mib"] > 0
    assert entry["aat_tiled_calls"] == 1 and entry["aat_density"] < 1
    assert found != exact and found == pytest.approx(exact, rel=0.05)


def test_sequence_classification(tmp_path):
    data = dict(train_dataset=Copies(classes=3), eval_dataset=Copies(8, classes=3))
    trained, found, entry = train(
        classifier(), tmp_path, data, max_steps=20, logging_steps=10, per_device_eval_batch_size=2
    )
    assert found[-1] < found[0] and entry["aat_tiled_calls"] == 1
    assert trained.evaluate()["eval_aat_dense_calls"] == 0


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    _, whole, _ = train(language_model(), tmp_path, per_device_train_batch_size=4)
    _, parts, _ = train(language_model(), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    _, plain, _ = train(language_model(), tmp_path)
    changes = {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": reentrant}}
    _, recomputed, entry = train(language_model(), tmp_path, **changes)
    assert recomputed == pytest.approx(plain, rel=1e-5) and entry["aat_tiled_calls"] == 1


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_precision(kind, tmp_path):
    _, full, _ = train(language_model(), tmp_path)
    _, half, entry = train(language_model(), tmp_path, **{kind: True})
    assert half != full and half == pytest.approx(full, rel=0.02) and entry["aat_tiled_calls"] == 1


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # float32 is meant
@pytest.mark.filterwarnings("ignore:(?s).*Online softmax is disabled:UserWarning")
def test_torch_compile_changes_nothing(tmp_path):
    # keeping all that counts: where the operator is not supported, compiled attention is exact
    settings = dict(tolerance=1e-6)
    _, eager, _ = train(language_model(**settings), tmp_path, max_steps=4)
    _, compiled, entry = train(language_model(**settings), tmp_path, torch_compile=True, max_steps=4)
    assert compiled == pytest.approx(eager, rel=1e-4)
    assert entry.get("aat_tiled_calls", 0) == operator.SUPPORTED


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("bf16", [False, True])
def test_lora(bf16, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    frozen = model.base_model.model.transformer.wte.weight.clone()
    _, found, entry = train(model, tmp_path, max_steps=20, logging_steps=10, learning_rate=0.03, bf16=bf16)
    assert found[-1] < found[0] and entry["aat_tiled_calls"] == 1
    assert torch.equal(model.base_model.model.transformer.wte.weight.cpu(), frozen)


def test_all_of_it_at_once_and_resumed(tmp_path):
    how = {CHECKPOINTING: True, "bf16": True, "gradient_accumulation_steps": 2, "logging_steps": 1}
    how |= dict(save_strategy="steps", save_steps=3)
    _, whole, entry = train(language_model(), tmp_path, **how)
    assert entry["aat_tiled_calls"] == 1 and whole[-1] < whole[0]
    resumed = trainer(language_model(), arguments(tmp_path, use_cpu=False, **how), [AATCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 6 and losses(resumed) == pytest.approx(whole, rel=2e-4)  # in bfloat16
