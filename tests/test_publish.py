"""`aat publish`: the repository is whole, its card holds what was measured, and nothing is sent unless told to."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from tiny_model import byte_tokenizer

import aat_hf
from aat_hf import cli
from aat_hf.bench._common import write_csv
from aat_hf.evaluation.generation import TaskResult
from aat_hf.evaluation.predictions import evaluate_predictions
from aat_hf.publish.evaluation import evaluation_tables
from aat_hf.publish.training import Training, loss_table

ROOT = Path(__file__).parents[1]
SMALL = dict(
    tolerance=0.3, query_tile=16, key_tile=16, min_length=0, dense_prefix=0, max_kept=1.0, sample_stride=8,
    local_keys=0, sink_keys=0, backend="gather",
)  # fmt: skip
LENGTH = 128


class Bytes(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def train(folder: Path, attention: str) -> tf.Trainer:
    tf.set_seed(0)
    config = aat_hf.AATGPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=LENGTH, bos_token_id=256, eos_token_id=256,
        aat=SMALL,
    )  # fmt: skip
    model = aat_hf.AATGPT2LMHeadModel._from_config(config, attn_implementation=attention)
    arguments = tf.TrainingArguments(
        output_dir=str(folder), max_steps=12, logging_steps=1, per_device_train_batch_size=1, save_strategy="no",
        report_to=[], use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = tf.Trainer(
        model, arguments, train_dataset=Bytes(), eval_dataset=Bytes(), processing_class=byte_tokenizer(),
        callbacks=[aat_hf.AATCallback()] if attention == "aat" else [],
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    return trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model, its evaluation in `eval`, its dense twin in `dense`."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("made") / "trained"
    trainer = train(folder, "aat")
    train(folder / "dense", "sdpa")
    ids, settings = Bytes()[99]["input_ids"][None], aat_hf.AATConfig(**SMALL)
    write_csv(folder / "eval/predictions.csv", evaluate_predictions(trainer.model.eval(), ids, [settings], buckets=2))
    (folder / "eval/eval.png").write_bytes(b"a picture")
    return folder


@pytest.fixture
def trained(made: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(made, tmp_path / "trained"))


def publish(trained: Path, target: Path, *more: str) -> int:
    options = ["--eval", str(trained / "eval"), "--license", "apache-2.0", "--license-file", str(ROOT / "LICENSE")]
    return cli.main(["publish", str(trained), str(target), *options, "--data", "bytes", "--hardware", "a CPU", *more])


def log_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_the_repository_is_whole(trained: Path, tmp_path: Path):
    target = tmp_path / "repository"
    assert publish(trained, target, "--dense", str(trained / "dense")) == 0
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE", "README.md", "SHA256SUMS", "config.json", "configuration_aat.py", "configuration_aat_gpt2.py",
        "eval/eval.png", "eval/predictions.csv", "generation_config.json", "model.safetensors", "modeling_aat.py",
        "modeling_aat_gpt2.py", "tokenizer.json", "tokenizer_config.json", "training_log.csv", "training_log_dense.csv",
    }  # fmt: skip
    sums = dict(reversed(line.split("  ")) for line in (target / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in files - {"SHA256SUMS"}}
    for name in files - {"eval/eval.png", "model.safetensors"}:
        assert str(tmp_path) not in (target / name).read_text("utf-8"), name

    ids = Bytes()[0]["input_ids"][None]
    model = tf.AutoModelForCausalLM.from_pretrained(target)
    assert type(model) is aat_hf.AATGPT2LMHeadModel and model.config._attn_implementation == "aat"
    assert torch.equal(model(ids).logits, tf.AutoModelForCausalLM.from_pretrained(trained)(ids).logits)
    assert tf.AutoTokenizer.from_pretrained(target)("text").input_ids == byte_tokenizer()("text").input_ids
    with (target / "training_log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows if row["loss"]] == [e["loss"] for e in log_of(trained) if "loss" in e]


def test_the_card_holds_what_was_measured(trained: Path, tmp_path: Path):
    target = tmp_path / "repository"
    assert publish(trained, target, "--dense", str(trained / "dense"), "--name", "A name") == 0
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in card.text.splitlines()}
    aat, dense = log_of(trained), log_of(trained / "dense")

    def last(log: list[dict[str, Any]], name: str) -> float:
        return next(entry[name] for entry in reversed(log) if name in entry)

    assert cells["held-out loss, nats per token"] == [f"{last(log, 'eval_loss'):.4f}" for log in (aat, dense)]
    times = [f"{1000 * last(log, 'train_runtime') / 12:.1f}" for log in (aat, dense)]
    assert cells["time per step, mean with the start, ms"] == times
    assert cells["density of tiles, last sample"] == [f"{last(aat, 'aat_density'):.3f}", "1"]
    assert last(aat, "aat_infidelity") > 0
    assert cells["audited infidelity, last sample"][0].startswith(f"{last(aat, 'aat_infidelity'):.4f} ±")
    assert cells["12"] == [f"{log[11]['loss']:.4f}" for log in (aat, dense)]
    parameters = sum(p.numel() for p in tf.AutoModelForCausalLM.from_pretrained(target).parameters())
    assert cells["parameters"] == [f"{parameters:,}"]
    assert evaluation_tables(trained / "eval")["predictions.csv"] in card.text
    assert "![Evaluation](eval/eval.png)" in card.text and card.text.lstrip().startswith("# A name")


def test_without_a_twin_the_card_has_one_column(trained: Path, tmp_path: Path):
    (trained / "eval/eval.png").unlink()
    assert publish(trained, tmp_path / "repository") == 0
    card = (tmp_path / "repository/README.md").read_text("utf-8")
    assert "dense (SDPA)" not in card and "loss, dense" not in card and "eval.png" not in card
    assert not (tmp_path / "repository/training_log_dense.csv").exists()


def drop(name: str) -> Any:
    """Takes a number out of the log."""

    def spoil(folder: Path) -> None:
        state = json.loads((folder / "trainer_state.json").read_text())
        for entry in state["log_history"]:
            entry.pop(name, None)
        (folder / "trainer_state.json").write_text(json.dumps(state))

    return spoil


def nan_loss(folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    state["log_history"][-1]["eval_loss"] = math.nan
    (folder / "trainer_state.json").write_text(json.dumps(state))


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def drop_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.0.mlp.c_fc.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "no tokenizer_config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load .*model.safetensors"),
        (damage_weights, "cannot load .*safetensors"),
        (drop_weight, r"lack 1 tensors .*transformer\.h\.0\.mlp\.c_fc\.weight"),
        (
            lambda folder: (folder / "trainer_state.json").unlink(),
            r"no .*trainer_state\.json: save",
        ),
        (lambda folder: (folder / "trainer_state.json").write_text("{"), "is no Trainer's state"),
        (drop("loss"), "gives no loss .*log at least one"),
        (drop("eval_loss"), r"gives no eval_loss \(it was never logged\): call trainer.evaluate"),
        (nan_loss, r"gives no eval_loss \(its last value is nan\)"),
        (drop("train_runtime"), "gives no train_runtime"),
        (drop("aat_density"), "gives no aat_density .*AATCallback"),
        (drop("aat_infidelity"), "gives no aat_infidelity"),
        (lambda folder: (folder / "eval/predictions.csv").unlink(), "no CSV file in .*aat eval --model"),
        (lambda folder: (folder / "eval/predictions.csv").write_text("tolerance\n0.1\n"), "is no table of results"),
        (lambda folder: (folder / "eval/tasks.csv").write_text(""), "tasks.csv is no table of results"),
    ],
)
def test_what_is_missing_is_refused(spoil: Any, message: str, trained: Path, tmp_path: Path, capsys: Any):
    spoil(trained)
    before = sorted(tmp_path.iterdir())
    assert publish(trained, tmp_path / "repository") == 1
    assert re.search(f"^aat: .*{message}", capsys.readouterr().err, re.MULTILINE | re.DOTALL)
    assert sorted(tmp_path.iterdir()) == before


def test_a_repository_is_not_overwritten(trained: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "repository").mkdir()
    assert publish(trained, tmp_path / "repository") == 0
    before = (tmp_path / "repository/SHA256SUMS").read_text()
    assert publish(trained, tmp_path / "repository") == 1
    assert "repository exists" in capsys.readouterr().err
    assert (tmp_path / "repository/SHA256SUMS").read_text() == before


def test_an_empty_licence_is_refused(trained: Path, tmp_path: Path, capsys: Any):
    (tmp_path / "empty").touch()
    assert publish(trained, tmp_path / "repository", "--license-file", str(tmp_path / "empty")) == 1
    assert "no licence in" in capsys.readouterr().err


def test_weights_are_split_to_fit(trained: Path, tmp_path: Path, capsys: Any):
    assert publish(trained, tmp_path / "repository", "--max-file-mb", "0.05") == 0
    sizes = [file.stat().st_size for file in (tmp_path / "repository").glob("*.safetensors")]
    assert len(sizes) > 1 and max(sizes) <= 50_000
    assert f"in {len(sizes)} files" in (tmp_path / "repository/README.md").read_text("utf-8")
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "repository")
    assert publish(trained, tmp_path / "other", "--max-file-mb", "0.02") == 1
    assert "one of its tensors is that large" in capsys.readouterr().err


def test_templates(trained: Path, tmp_path: Path, capsys: Any):
    template = tmp_path / "mine.md"
    template.write_text('{% extends "card.md" %}{% block limits %}Of {{ data }} only.{% endblock %}')
    assert publish(trained, tmp_path / "repository", "--template", str(template)) == 0
    assert "## Limits\n\nOf bytes only." in (tmp_path / "repository/README.md").read_text("utf-8")
    template.write_text("{{ a_number_nobody_measured }}")
    assert publish(trained, tmp_path / "other", "--template", str(template)) == 1
    assert "a_number_nobody_measured' is undefined" in capsys.readouterr().err
    assert publish(trained, tmp_path / "other", "--template", str(tmp_path / "none.md")) == 1
    assert "none.md cannot be rendered" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "shown"), [(1, [1]), (4, [1, 2, 3, 4]), (25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25])])
def test_the_loss_table_ends_with_the_last_step(count: int, shown: list[int]):
    log = [{"step": step, "loss": 1 / step} for step in range(1, count + 1)]
    lines = loss_table(Training(Path("here"), count, log), None).splitlines()[2:]
    assert lines == [f"| {step} | {1 / step:.4f} |" for step in shown]


def test_a_twin_of_other_steps_is_refused(trained: Path, tmp_path: Path, capsys: Any):
    state = json.loads((trained / "dense/trainer_state.json").read_text())
    state["log_history"][3]["step"] = 99
    (trained / "dense/trainer_state.json").write_text(json.dumps(state))
    assert publish(trained, tmp_path / "repository", "--dense", str(trained / "dense")) == 1
    assert "log other steps" in capsys.readouterr().err


def test_tables_of_other_evaluations(tmp_path: Path):
    tasks = [TaskResult("needle", tolerance, 100.0, 4, 0.75, 1.0, 0.5, math.nan) for tolerance in (None, 0.1)]
    write_csv(tmp_path / "tasks.csv", tasks)
    (tmp_path / "masked.csv").write_text("attention,loss,lost\naat 0.1,5.98765,nan\n")
    tables = evaluation_tables(tmp_path)
    assert list(tables) == ["masked.csv", "tasks.csv"]
    assert tables["masked.csv"].endswith("| aat 0.1 | 5.988 | – |")
    assert [line.split(" | ")[1] for line in tables["tasks.csv"].splitlines()[2:]] == ["dense", "aat 0.1"]


class FakeHub:
    """Stands in for `HfApi` and keeps what it was asked to do."""

    calls: list[tuple[str, Any, Any]] = []  # noqa: RUF012  (each test sets its own)
    error: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.calls.append(("create", repo_id, (private, exist_ok)))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(FakeHub, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_nothing_is_sent_unless_told_to(hub: type[FakeHub], trained: Path, tmp_path: Path, capsys: Any):
    assert publish(trained, tmp_path / "repository") == 0
    assert hub.calls == []
    assert publish(trained, tmp_path / "pushed", "--push", "me/mine", "--private") == 0
    files = sorted(path.name for path in (tmp_path / "pushed").iterdir())
    assert hub.calls == [("create", "me/mine", (True, True)), ("upload", "me/mine", files)]
    assert capsys.readouterr().out == "https://hub/commit/1\n"
    assert 'from_pretrained("me/mine")' in (tmp_path / "pushed/README.md").read_text("utf-8")


def test_a_refused_push_says_why_and_keeps_the_folder(
    hub: type[FakeHub], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    from huggingface_hub.errors import HTTPError

    monkeypatch.setattr(hub, "error", HTTPError("403 Forbidden"))
    assert publish(trained, tmp_path / "repository", "--push", "me/mine") == 1
    assert "me/mine was not pushed (403 Forbidden)" in capsys.readouterr().err
    assert (tmp_path / "repository/SHA256SUMS").is_file()


@pytest.mark.parametrize(
    ("script", "name", "auto", "more"),
    [
        ("build_gpt2_long.py", "aat-gpt2-long", tf.AutoModelForCausalLM, ["--eval-buckets", "2"]),
        ("build_bert_base_mini.py", "aat-bert-base-mini", tf.AutoModelForMaskedLM, []),
    ],
)
def test_the_example_models_are_built_by_one_command(
    script: str, name: str, auto: Any, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for library in ("datasets", "matplotlib"):
        pytest.importorskip(library)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for setting, value in {**SMALL, "local_keys": 16, "sink_keys": 16}.items():
        monkeypatch.setenv(f"AAT_{setting.upper()}", str(value))
    monkeypatch.delenv("AAT_TOLERANCE")
    for folder in ("examples", "model_cards"):
        monkeypatch.syspath_prepend(ROOT / folder)
    sizes = dict(tokens=128, steps=3, batch=1, layers=1, width=32, heads=2, vocabulary=300, held_out_rows=2)
    options = [part for option, value in sizes.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    options += ["--text", __file__, "--data", "a test", "--tolerance", "0.5", "--tolerances", "0.5", *more]
    runpy.run_path(str(ROOT / "model_cards" / script))["main"]([*options, "--output", str(tmp_path / "out")])
    repository = tmp_path / "out" / name
    assert type(auto.from_pretrained(repository)).__name__.startswith("AAT")
    card = (repository / "README.md").read_text("utf-8")
    assert f"model_cards/{script}" in card and "time per step, median, ms" in card and "loss, dense" in card
    assert max(file.stat().st_size for file in repository.glob("*.safetensors")) <= 16e6
    assert list((repository / "eval").glob("*.csv"))
