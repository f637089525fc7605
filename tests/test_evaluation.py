"""`aat eval`: tasks made from a seed, their scores, predictions by position, and the files it writes."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import byte_tokenizer, tiny_llama

import aat_hf
from aat_hf import cli
from aat_hf.compare import ComparisonError, quality, run_pass
from aat_hf.config import AATConfig
from aat_hf.evaluation import command
from aat_hf.evaluation.generation import evaluate_tasks
from aat_hf.evaluation.predictions import evaluate_predictions, token_nll
from aat_hf.evaluation.tasks import TASKS, Example, make_example, score


def shorter_than(characters: int) -> Any:
    return lambda example: len(example.prompt) <= characters


@pytest.mark.parametrize("task", TASKS)
def test_examples_fill_the_length_and_follow_the_seed(task: str):
    example = make_example(task, 0, 0, shorter_than(6000))
    assert 5000 < len(example.prompt) <= 6000
    assert example == make_example(task, 0, 0, shorter_than(6000))
    assert example != make_example(task, 0, 1, shorter_than(6000))
    assert example.answers != make_example(task, 1, 0, shorter_than(6000)).answers
    with pytest.raises(ComparisonError, match="allow more tokens"):
        make_example(task, 0, 0, shorter_than(100))


@given(number=st.integers(0, 10**6))
def test_the_needle_is_in_the_text_once(number: int):
    example = make_example("needle", 0, number, shorter_than(3000))
    key = re.search(r"number for (\w+) mentioned", example.prompt)[1]  # type: ignore[index]
    assert re.findall(rf"magic numbers for {key} is: (\d+)\.", example.prompt) == list(example.answers)


@given(number=st.integers(0, 10**6))
def test_the_variables_can_be_tracked(number: int):
    example = make_example("variables", 0, number, shorter_than(3000))
    value = re.search(r"assigned the value (\d+)", example.prompt)[1]  # type: ignore[index]
    values: dict[str, str] = {}
    for name, given_to_it in re.findall(r"^VAR (\w+) = (.+)$", example.prompt, re.MULTILINE):
        values[name] = values[given_to_it[4:]] if given_to_it.startswith("VAR ") else given_to_it
    assert values == dict.fromkeys(example.answers, value)
    assert len(example.answers) == 5


def test_the_common_words_are_the_common_ones():
    example = make_example("words", 0, 0, shorter_than(8000))
    words = re.findall(r"\d+\. ([a-z]+)", example.prompt)
    counts = {word: words.count(word) for word in words}
    assert {word for word, count in counts.items() if count == 30} == set(example.answers)
    assert set(counts.values()) == {3, 30} and len(example.answers) == 10


@pytest.mark.parametrize(("written", "share"), [("It is ABC and xyz.", 1), ("abc", 0.5), ("ab c x y z", 0), ("", 0)])
def test_score_is_the_share_of_answers(written: str, share: float):
    assert score(written, ("abc", "XYZ")) == share


def test_predictions_are_those_of_whole_passes(small: AATConfig):
    model = tiny_llama()
    ids = torch.randint(0, 256, (1, 400))
    results = evaluate_predictions(model, ids, [small.replace(tolerance=0.5), small.replace(tolerance=0.0)], buckets=3)
    assert [(r.tolerance, r.first, r.last) for r in results[:4]] == [
        (0.5, 0, 398), (0.5, 0, 132), (0.5, 133, 265), (0.5, 266, 398),
    ]  # fmt: skip
    whole, *ranges = results[:4]
    assert 0 < whole.density < 1 and 0 < whole.lost < 0.5 and whole.kl > 0
    for name in ("nll_dense", "nll_aat", "kl", "top1_agreement"):
        assert sum(getattr(r, name) for r in ranges) / 3 == pytest.approx(getattr(whole, name), rel=1e-5, abs=1e-7)
    dense = run_pass(model, ids, "sdpa").hidden
    aat_hf.configure(model, **small.replace(tolerance=0.5).to_dict())
    assert whole.kl == pytest.approx(quality(model, ids, dense, run_pass(model, ids, "aat").hidden).kl, rel=1e-4)
    exact = results[4]
    assert exact.density == 1 and exact.kl == pytest.approx(0, abs=1e-6) and exact.top1_agreement == 1
    with pytest.raises(ComparisonError, match="cannot be split into 9 ranges"):
        evaluate_predictions(model, ids[:, :5], [small], buckets=9)


def test_token_nll_is_the_models_loss():
    model, ids = tiny_llama(), torch.randint(0, 256, (1, 77))
    losses = token_nll(model, ids, run_pass(model, ids, "sdpa").hidden, chunk=20)
    assert losses.shape == (76,)
    with torch.inference_mode():
        assert float(losses.mean()) == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)


class Oracle:
    """A model that writes what a test tells it, dense or tiled."""

    device = torch.device("cpu")

    def __init__(self, model: Any, tokenizer: Any, says: dict[str, str]) -> None:
        self.model, self.tokenizer, self.says = model, tokenizer, says

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def generate(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        assert options["max_new_tokens"] > 0 and not options["do_sample"]
        answer = self.says[self.model.config._attn_implementation]
        if answer == "needle":
            prompt = self.tokenizer.decode(input_ids[0])
            answer = re.search(r"is: (\d+)\.", prompt)[1]  # type: ignore[index]
        return torch.cat([input_ids, torch.tensor([self.tokenizer(answer).input_ids])], dim=1)


@pytest.mark.parametrize(("tiled", "share", "same"), [("needle", 1, 1), ("no idea", 0, 0)])
def test_tasks_are_scored_dense_and_tiled(
    small: AATConfig, monkeypatch: pytest.MonkeyPatch, tiled: str, share: float, same: float
):
    tokenizer = byte_tokenizer()
    oracle = Oracle(tiny_llama(), tokenizer, {"sdpa": "needle", "aat": tiled})
    monkeypatch.setattr(aat_hf, "record", lambda model: aat_hf.report.record.record(model.model))
    monkeypatch.setattr(aat_hf, "configure", lambda model, **changes: None)
    dense, aat = evaluate_tasks(oracle, tokenizer, ["needle"], [small], tokens=1200, examples=3, seed=0)
    assert (dense.tolerance, dense.score, dense.same_as_dense, dense.density) == (None, 1, 1, 1)
    assert (aat.tolerance, aat.score, aat.same_as_dense) == (small.tolerance, share, same)
    assert 1000 < dense.tokens <= 1200 - 16 and dense.examples == 3


def test_exact_attention_writes_what_dense_does(small: AATConfig):
    exact = small.replace(tolerance=0.0)
    loose = small.replace(tolerance=0.5)
    results = evaluate_tasks(tiny_llama(), byte_tokenizer(), ["needle"], [exact, loose], tokens=700, examples=2, seed=0)
    assert [r.same_as_dense for r in results[:2]] == [1, 1]
    assert [r.density for r in results[:2]] == [1, 1]
    assert results[2].density < 1 and results[2].lost > 0


def test_a_chat_template_is_used():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    from aat_hf.evaluation.generation import _encode

    ids = _encode(Example("question", "The answer is", ("x",), 4), tokenizer)
    assert tokenizer.decode(ids) == "<user>question<assistant>The answer is"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "load", lambda name: (tiny_llama(), byte_tokenizer()))


SETTINGS = '{"min_length": 0, "dense_prefix": 0, "query_tile": 32, "key_tile": 32, "backend": "gather"}'


@pytest.mark.usefixtures("loaded")
def test_the_command_writes_table_csv_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    options = ["--tokens", "700", "--tolerances", "0.5", "0.1", "--what", "predictions", "needle", "--examples", "1"]
    assert cli.main(["eval", *options, "--buckets", "2", "--settings", SETTINGS, "--out", str(tmp_path / "new")]) == 0
    shown = capsys.readouterr()
    assert "| tolerance | density" in shown.out and "| 350–698 |" in shown.out and "| needle | dense |" in shown.out
    assert "nothing was tiled" not in shown.err
    assert (tmp_path / "new" / "eval.md").read_text("utf-8") == shown.out
    with (tmp_path / "new" / "predictions.csv").open(encoding="utf-8") as file:
        assert [row["tolerance"] for row in csv.DictReader(file)] == ["0.5"] * 3 + ["0.1"] * 3
    with (tmp_path / "new" / "tasks.csv").open(encoding="utf-8") as file:
        assert [row["tolerance"] for row in csv.DictReader(file)] == ["", "0.5", "0.1"]
    assert (tmp_path / "new" / "eval.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("loaded")
def test_the_command_says_when_nothing_was_tiled(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["eval", "--tokens", "60", "--tolerances", "0.1", "--what", "predictions", "--buckets", "2"]) == 0
    assert "nothing was tiled" in capsys.readouterr().err


@pytest.mark.usefixtures("loaded")
def test_the_command_refuses_what_cannot_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--settings", '{"colour": 1}'])
    assert "no field colour" in capsys.readouterr().err
    assert cli.main(["eval", "--tokens", "60", "--what", "needle"]) == 1
    assert "task 'needle' is too long" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["eval", "--out", str(tmp_path)]) == 1
    assert "pip install 'aat-hf[viz]'" in capsys.readouterr().err
