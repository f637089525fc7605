"""`aat publish`: the repository is whole and its card holds what was measured."""

from __future__ import annotations

import csv
import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from publishing import Bytes, log_of, publish
from tiny_model import byte_tokenizer

import aat_hf
from aat_hf.bench._common import write_csv
from aat_hf.evaluation.generation import TaskResult
from aat_hf.publish.evaluation import evaluation_tables
from aat_hf.publish.training import Training, loss_table


def test_the_repository_is_whole(trained: Path, tmp_path: Path):
    target = tmp_path / "repository"
    assert publish(trained, target, "--dense", str(trained / "dense")) == 0
    files = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE", "README.md", "SHA256SUMS", "config.json", "configuration_aat.py", "configuration_aat_gpt2.py",
        "eval/eval.png", "eval/predictions.csv", "generation_config.json", "model.safetensors", "modeling_aat.py",
        "modeling_aat_gpt2.py", "tokenizer.json", "tokenizer_config.json", "training.png", "training_log.csv",
        "training_log_dense.csv",
    }  # fmt: skip
    sums = dict(reversed(line.split("  ")) for line in (target / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((target / name).read_bytes()).hexdigest() for name in files - {"SHA256SUMS"}}
    for name in files - {"eval/eval.png", "training.png", "model.safetensors"}:
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
    assert "![Training loss](training.png)" in card.text and "![Evaluation](eval/eval.png)" in card.text
    assert card.text.lstrip().startswith("# A name")


def test_without_a_twin_the_card_has_one_column(trained: Path, tmp_path: Path):
    (trained / "eval/eval.png").unlink()
    assert publish(trained, tmp_path / "repository") == 0
    card = (tmp_path / "repository/README.md").read_text("utf-8")
    assert "dense (SDPA)" not in card and "loss, dense" not in card and "eval.png" not in card
    assert not (tmp_path / "repository/training_log_dense.csv").exists()


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


def test_the_loss_table_shows_a_tolerance_that_changed():
    log = [{"step": 1, "loss": 3.0}] + [{"step": 1 + n, "loss": 2.0, "aat_tolerance": 0.05 * (n == 2)} for n in (1, 2)]
    lines = loss_table(Training(Path("here"), 3, log), None).splitlines()
    assert lines[0].endswith("tolerance |")
    assert [line.split(" | ")[-1] for line in lines[2:]] == ["– |", "0 |", "0.05 |"]


def test_tables_of_other_evaluations(tmp_path: Path):
    tasks = [TaskResult("needle", tolerance, 100.0, 4, 0.75, 1.0, 0.5, math.nan) for tolerance in (None, 0.1)]
    write_csv(tmp_path / "tasks.csv", tasks)
    (tmp_path / "masked.csv").write_text("attention,loss,lost\naat 0.1,5.98765,nan\n")
    tables = evaluation_tables(tmp_path)
    assert list(tables) == ["masked.csv", "tasks.csv"]
    assert tables["masked.csv"].endswith("| aat 0.1 | 5.988 | – |")
    assert [line.split(" | ")[1] for line in tables["tasks.csv"].splitlines()[2:]] == ["dense", "aat 0.1"]
