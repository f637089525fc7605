"""`aat publish --push`: nothing is sent unless told to. The example models are built by one command."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import transformers as tf
from publishing import ROOT, SMALL, publish


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
        (
            "build_bert_base_mini.py",
            "aat-bert-base-mini",
            tf.AutoModelForMaskedLM,
            ["--short-tokens=64", "--short-steps=2"],
        ),
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
    sizes = dict(
        tokens=128, steps=3, exact_steps=1, batch=1, layers=1, width=32, heads=2, vocabulary=300, held_out_rows=2
    )  # fmt: skip
    options = [part for option, value in sizes.items() for part in (f"--{option.replace('_', '-')}", str(value))]
    options += ["--text", __file__, "--data", "a test", "--tolerance", "0.5", "--tolerances", "0.5", *more]
    runpy.run_path(str(ROOT / "model_cards" / script))["main"]([*options, "--output", str(tmp_path / "out")])
    repository = tmp_path / "out" / name
    assert type(auto.from_pretrained(repository)).__name__.startswith("AAT")
    card = (repository / "README.md").read_text("utf-8")
    assert f"model_cards/{script}" in card and "time per step, median, ms" in card and "loss, dense" in card
    assert max(file.stat().st_size for file in repository.glob("*.safetensors")) <= 16e6
    assert list((repository / "eval").glob("*.csv"))
