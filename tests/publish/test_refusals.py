"""`aat publish` refuses what is incomplete, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from publishing import publish


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


def test_a_twin_of_other_steps_is_refused(trained: Path, tmp_path: Path, capsys: Any):
    state = json.loads((trained / "dense/trainer_state.json").read_text())
    state["log_history"][3]["step"] = 99
    (trained / "dense/trainer_state.json").write_text(json.dumps(state))
    assert publish(trained, tmp_path / "repository", "--dense", str(trained / "dense")) == 1
    assert "log other steps" in capsys.readouterr().err
