"""Fine-tuning with the Trainer: what it can be asked to do, and that exact attention trains as SDPA does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from train_distributed import STEPS, by_trainer
from training import Copies, arguments, classifier, language_model, losses, trainer

import aat_hf
from aat_hf import AATCallback
from aat_hf.report import stages

pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, folder, how=(), **changes):
    trained = trainer(model, arguments(folder, **changes), [AATCallback()], **dict(how))
    trained.train()
    found = losses(trained)
    assert all(torch.isfinite(torch.tensor(found)))
    entry = next(entry for entry in trained.state.log_history if "loss" in entry)
    return trained, found, entry


def test_zero_tolerance_trains_as_sdpa_does(tmp_path):
    _, aat, _ = train(language_model("aat", tolerance=0.0), tmp_path, max_steps=50, logging_steps=1)
    _, sdpa, _ = train(language_model("sdpa"), tmp_path, max_steps=50, logging_steps=1)
    assert len(aat) == 50 and aat[-1] < aat[0] - 0.3
    assert aat == pytest.approx(sdpa, rel=2e-5)


def test_tiled_training_learns(tmp_path):
    _, found, entry = train(language_model(), tmp_path, max_steps=30, logging_steps=10)
    _, exact, _ = train(language_model(tolerance=0.0), tmp_path, max_steps=30, logging_steps=10)
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
    _, whole, one = train(language_model(), tmp_path, per_device_train_batch_size=4)
    _, parts, four = train(language_model(), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert parts[0] == pytest.approx(whole[0], rel=1e-6) and four["grad_norm"] == pytest.approx(
        one["grad_norm"], rel=1e-4
    )
    assert parts == pytest.approx(whole, rel=5e-4)  # sums in another order move weights, and may tip a tile


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    _, plain, _ = train(language_model(), tmp_path)
    renamed = "activation_checkpointing" in {field.name for field in dataclasses.fields(tf.TrainingArguments)}
    name = "activation_checkpointing" if renamed else "gradient_checkpointing"
    changes = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
    _, recomputed, entry = train(language_model(), tmp_path, **changes)
    assert recomputed == pytest.approx(plain, rel=1e-6) and entry["aat_tiled_calls"] == 1


def test_bf16(tmp_path):
    _, full, _ = train(language_model(), tmp_path)
    _, half, entry = train(language_model(), tmp_path, bf16=True)
    assert half != full and half == pytest.approx(full, rel=0.02) and entry["aat_tiled_calls"] == 1


@pytest.mark.slow
@pytest.mark.skipif(not aat_hf.hf.operator.SUPPORTED, reason="tiles inside torch.compile need torch 2.13")
@pytest.mark.parametrize("geometry", ["euclidean", "hyperbolic"])
def test_torch_compile_changes_nothing(tmp_path, geometry):
    # keeping all that counts, since the compiled mask is a table and its selection may round another way
    settings = dict(geometry=geometry, learn_curvature=geometry != "euclidean", tolerance=1e-6)
    _, eager, _ = train(language_model(**settings), tmp_path, max_steps=4)
    changes = dict(torch_compile=True, torch_compile_backend="aot_eager", max_steps=4)
    trained, compiled, entry = train(language_model(**settings), tmp_path, **changes)
    assert compiled == pytest.approx(eager, rel=2e-5) and entry["aat_tiled_calls"] == 1
    for module in trained.model.modules():
        if isinstance(module, tf.models.gpt2.modeling_gpt2.GPT2Attention) and geometry != "euclidean":
            assert not torch.equal(module.aat_curvature(), torch.ones(2))


@pytest.mark.slow
def test_a_schedule_that_leaves_zero_compiles_again(tmp_path):
    callback = AATCallback(schedule="training:quadratic")
    args = arguments(tmp_path, logging_steps=1, max_steps=3, torch_compile=True, torch_compile_backend="aot_eager")
    trained = trainer(language_model(), args, [callback])
    trained.train()
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert entries[0]["aat_tolerance"] == 0 and entries[-1]["aat_tolerance"] > 0
    assert entries[-1]["aat_tiled_calls"] == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    frozen = model.base_model.model.transformer.wte.weight.clone()
    callback = AATCallback(schedule="linear", start=0.4, tolerance=0.2)
    trained = trainer(model, arguments(tmp_path, max_steps=20, logging_steps=10, learning_rate=0.03), [callback])
    trained.train()
    found = losses(trained)
    assert found[-1] < found[0] and torch.equal(model.base_model.model.transformer.wte.weight, frozen)
    entries = [entry for entry in trained.state.log_history if "loss" in entry]
    assert entries[-1]["aat_tolerance"] == pytest.approx(0.21) and entries[-1]["aat_tiled_calls"] == 1


class Interrupt(tf.TrainerCallback):
    """What Ctrl-C does, in the middle of a step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("attention", ["aat", "sdpa"])
def test_an_interrupted_training_goes_on_with_the_same_losses(attention, tmp_path):
    how = dict(logging_steps=1, save_strategy="steps", save_steps=2)
    _, whole, _ = train(language_model(attention), tmp_path / "whole", **how)
    timing, callback = stages.timing, AATCallback()
    with pytest.raises(KeyboardInterrupt):
        trainer(language_model(attention), arguments(tmp_path / "parts", **how), [Interrupt(), callback]).train()
    resumed = trainer(language_model(attention), arguments(tmp_path / "parts", **how), [callback])
    assert stages.timing == timing  # the step that was interrupted was listened to
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6 and losses(resumed) == whole


def launch(folder, kind):
    """Train in two processes, as `accelerate launch` starts them: what each found, in one go and (sharded) resumed."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
    command += ["--main_process_port=0", "--mixed_precision=no", "--dynamo_backend=no"]
    command += {"ddp": ["--multi_gpu"], "fsdp": ["--use_fsdp", "--fsdp_version=2"]}[kind]
    script = Path(__file__).with_name("train_distributed.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, str(script), str(folder), kind], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torch for Windows has no libuv rendezvous")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_equal_one(kind, tmp_path):
    (whole, *resumed), (others, *_) = launch(tmp_path, kind)
    assert len(resumed) == (kind == "fsdp")
    single = by_trainer(tmp_path / "single", batch=2)
    for name in ("loss", "aat_density", "aat_density_p10", "aat_infidelity", "aat_infidelity_ci"):
        expected = [entry[name] for entry in single if name in entry]
        assert len(expected) == 2
        for history in (whole, others, *resumed):
            assert [entry[name] for entry in history if name in entry] == pytest.approx(expected, rel=1e-3), name
    assert [set(entry) for entry in whole] == [set(entry) for entry in single]

    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "single" / f"checkpoint-{STEPS}")
    for (name, one), two in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-3), name
    assert hub_code(tmp_path / f"checkpoint-{STEPS}") == hub_code(tmp_path / "single" / f"checkpoint-{STEPS}")


def hub_code(folder):
    """The files of code in a saved model, and the classes in them that the Auto classes open."""
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    return sorted(path.name for path in folder.glob("*.py")), auto_map
