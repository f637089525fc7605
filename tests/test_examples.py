"""Every example runs offline on a tiny model and prints what it measured."""

from __future__ import annotations

import csv
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from tiny_model import byte_tokenizer, save_tiny
from transformers.models.distilbert.modeling_distilbert import create_sinusoidal_embeddings

EXAMPLES = Path(__file__).parents[1] / "examples"
CALLBACK_OVERHEAD = "../docs/callback_overhead.py"
TINY = [
    "--tokens=320", "--steps=4", "--layers=1", "--width=32", "--heads=2", "--vocabulary=300", "--held-out-rows=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, caches of its own, settings with which short texts are tiled, and the scripts' shared modules."""
    monkeypatch.syspath_prepend(EXAMPLES)
    datasets, evaluate = pytest.importorskip("datasets"), pytest.importorskip("evaluate")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    settings = {
        "MIN_LENGTH": 0, "DENSE_PREFIX": 0, "QUERY_TILE": 32, "KEY_TILE": 32, "BACKEND": "gather", "MAX_KEPT": 1,
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(f"AAT_{name}", str(value))


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """The arguments of a tiny training on a text of this machine."""
    pytest.importorskip("accelerate")
    (tmp_path / "text.txt").write_text("".join(f"Line {number} has {number**2} letters.\n" for number in range(800)))
    return [*TINY, "--text", str(tmp_path / "text.txt")]


@pytest.fixture
def shared(training: list[str]) -> list[str]:
    """Those of `training` that every script that trains has."""
    return [one for one in training if "held-out" not in one]


def run(name: str, *arguments: str) -> None:
    namespace: dict[str, Any] = runpy.run_path(str(EXAMPLES / name))
    namespace["main"](arguments)


def numbers(text: str, label: str) -> list[float]:
    """The numbers on the line that begins with a label."""
    line = re.search(rf"^{label}.*$", text, re.MULTILINE)
    assert line is not None, text
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line[0])]


def test_wikitext_offline_says_what_it_reads(model: str, capsys: pytest.CaptureFixture[str]):
    run("wikitext_demo.py", "--model", model, "--tokens", "300", "--tolerance", "0.5")
    shown = capsys.readouterr()
    assert "Reading Python's manual in its place" in shown.err
    assert "Python's manual: 299 tokens predicted" in shown.out
    assert 0 < numbers(shown.out, "density")[0] < 1
    assert 0 < numbers(shown.out, "infidelity")[0] < 0.5
    dense, tiled = numbers(shown.out, "perplexity")
    assert dense == pytest.approx(tiled, rel=0.05)


def test_wikitext_on_disk(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "wiki.test.raw").write_text(" = A title = \n\n" + " words of an article \n" * 40)
    run("wikitext_demo.py", "--model", model, "--tokens", "300", "--tolerance", "0", "--path", str(tmp_path))
    shown = capsys.readouterr().out
    assert "WikiText-2: 299 tokens predicted" in shown
    assert numbers(shown, "density") == [1, 1, 1] and "nothing was tiled" in shown


def test_github_packs_a_checkout(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "LICENSE").write_text("Apache License, Version 2.0")
    for number in range(4):
        code = f"def function{number}(argument):\n    return {number} * argument\n"
        (checkout / f"module{number}.py").write_text(12 * code)  # 588 bytes
    run("github_demo.py", str(checkout), "--model", model, "--tokens", "600", "--tolerance", "0.5")
    shown = capsys.readouterr()
    assert "4 of 5 files kept" in shown.err
    assert "4 files (4 Apache-2.0) make 4 sequences of 600 tokens" in shown.out
    assert "packs 2 documents" in shown.out
    assert 0 < numbers(shown.out, "density")[0] < 1


def test_the_demos_read_the_hub(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.syspath_prepend(Path(__file__).parent / "data")
    from datasets import Dataset
    from mock_hub import mock_hub, use_hub

    wikitext, code = tmp_path / "hub" / "Salesforce" / "wikitext", tmp_path / "hub" / "some" / "code"
    for folder in (wikitext, code):
        folder.mkdir(parents=True)
    files = "{config_name: wikitext-2-raw-v1, data_files: [{split: test, path: test.parquet}]}"
    (wikitext / "README.md").write_text(f"---\nconfigs:\n- {files}\n---\n")
    lines = ["\n", " = A title = \n", "\n", *40 * [" words of an article \n"]]
    Dataset.from_dict({"text": lines}).to_parquet(str(wikitext / "test.parquet"))
    (code / "README.md").write_text("# Code\n")
    content = [12 * f"def function{number}(argument):\n    return {number} * argument\n" for number in range(4)]
    columns = {"content": content, "path": [f"{n}.py" for n in range(4)], "license": 4 * ["mit"]}
    Dataset.from_dict(columns).to_parquet(str(code / "train-00000-of-00001.parquet"))
    with mock_hub(tmp_path / "hub") as (endpoint, _):
        use_hub(monkeypatch, endpoint, tmp_path / "home")
        run("wikitext_demo.py", "--model", model, "--tokens", "300", "--tolerance", "0.5")
        shown = capsys.readouterr()
        assert "WikiText-2: 299 tokens predicted" in shown.out and "in its place" not in shown.err
        run("github_demo.py", "some/code", "--model", model, "--tokens", "600", "--tolerance", "0.5")
    assert "4 files (4 mit) make 4 sequences of 600 tokens" in capsys.readouterr().out


def test_generation_streams_with_its_metrics(model: str, capsys: pytest.CaptureFixture[str]):
    run("streaming_generation.py", "--model", model, "--tokens", "300", "--new-tokens", "40", "--tolerance", "0.5")
    shown = capsys.readouterr()
    assert "[first token after" in shown.err and "infidelity" in shown.err and "[32 tokens," in shown.err
    assert "300 tokens read, 40 generated" in shown.out
    assert "milliseconds of attention: " in shown.out


def test_generation_answers_a_question_where_there_is_a_chat_template():
    asked = runpy.run_path(str(EXAMPLES / "streaming_generation.py"))["asked"]
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer("words of a long text " * 20).input_ids[:300]])
    assert asked(tokenizer, ids, "What is it?") is ids
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<answer>"
    assert asked(tokenizer, ids, "") is ids
    prompt = asked(tokenizer, ids, "What is it?")
    text = tokenizer.decode(prompt[0])
    assert prompt.shape == (1, 300)
    assert text.startswith("<user>words of") and text.endswith("\n\nWhat is it?<answer>")


@pytest.mark.parametrize("name", ["finetune_gpt2.py", "finetune_bert.py"])
def test_finetuning_says_what_it_measured(name: str, training: list[str], capsys: pytest.CaptureFixture[str]):
    run(name, *training, "--tolerance", "0.5", "--compare")
    shown = capsys.readouterr().out
    first, last, held_out, milliseconds = numbers(shown, "aat ")
    twin = numbers(shown, "dense ")
    assert "2 held out" in shown and last < first and min(milliseconds, twin[3]) > 0
    assert twin[:3] == pytest.approx([first, last, held_out], rel=0.02)
    assert numbers(shown, "density")[0] < 1 and 0 < numbers(shown, "infidelity")[0] < 0.5
    assert "100% tiled" in shown


@pytest.mark.parametrize("name", ["finetune_gpt2.py", "finetune_bert.py"])
def test_finetuning_without_tolerance_equals_its_twin(
    name: str, training: list[str], capsys: pytest.CaptureFixture[str]
):
    run(name, *training, "--tolerance", "0", "--compare")
    shown = capsys.readouterr().out
    assert numbers(shown, "aat ")[:3] == pytest.approx(numbers(shown, "dense ")[:3], abs=1.5e-4)
    assert "nothing was tiled" in shown


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [("MAX_KEPT", "0.01", "go on from a trained model (--model)"), ("MIN_LENGTH", "4000", "give more --tokens: such")],
)
def test_finetuning_says_why_nothing_was_tiled(
    setting: str, value: str, said: str, training: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setenv(f"AAT_{setting}", value)
    monkeypatch.setenv("AAT_BACKEND", "auto")
    run("finetune_gpt2.py", *training, "--tolerance", "0.5")
    shown = capsys.readouterr().out
    assert "0% tiled" in shown and f"to see tiles {said}" in shown


@pytest.mark.parametrize(
    ("name", "auto", "kind", "more"),
    [
        ("finetune_gpt2.py", "AutoModelForCausalLM", "AATGPT2LMHeadModel", []),
        ("finetune_bert.py", "AutoModelForMaskedLM", "AATBertForMaskedLM", ["--evaluate", "0.5"]),
    ],
)
def test_finetuning_goes_on_from_what_it_wrote(
    name: str, auto: str, kind: str, more: list[str], training: list[str], tmp_path: Path, capsys: Any
):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run(name, *training, "--output", first, "--learning-rate", "0.01", *more)
    losses = numbers(capsys.readouterr().out, "aat ")
    run(name, *training, "--model", first, "--output", second, "--compare")
    assert numbers(capsys.readouterr().out, "aat ")[0] < losses[0] - 0.1
    model = getattr(transformers, auto).from_pretrained(second)
    assert type(model).__name__ == kind and model.config.use_cache
    state = json.loads((tmp_path / "second" / "trainer_state.json").read_text())
    assert any("aat_density" in entry for entry in state["log_history"])
    assert (tmp_path / "second" / "dense" / "trainer_state.json").is_file()
    if more:
        with (tmp_path / "first" / "eval" / "masked.csv").open(newline="") as file:
            dense, tiled = csv.DictReader(file)
        assert [dense["attention"], tiled["attention"]] == ["dense", "aat 0.5"]
        assert float(dense["density"]) == 1 > float(tiled["density"]) and 0 < float(tiled["lost"]) < 0.5
        assert float(dense["loss"]) == pytest.approx(float(tiled["loss"]), rel=0.02)


def test_one_of_several_processes_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    import _finetuning

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        _finetuning.say(f"of {rank}")
        state = SimpleNamespace(save_to_json=Path.touch)
        _finetuning.save_log(SimpleNamespace(trainer=SimpleNamespace(state=state)), tmp_path / rank)
    assert capsys.readouterr().out == "of 0\n"
    assert not (tmp_path / "1").exists() and (tmp_path / "0" / "trainer_state.json").exists()


def test_finetuning_on_wikitext(training: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split, articles in (("train", 30), ("valid", 8)):
        text = " words that follow it \n" * 30
        lines = "".join(f"\n = Article {number} of {split} = \n\n{text}" for number in range(articles))
        (tmp_path / f"wiki.{split}.raw").write_text(lines)
    output = tmp_path / "output"
    run("finetune_gpt2.py", *training, "--text", "wikitext-2-raw-v1", "--path", str(tmp_path), "--output", str(output))
    assert "wikitext-2-raw-v1: " in capsys.readouterr().out
    held_out = (output / "held_out.txt").read_text("utf-8")
    assert held_out.count("of valid") == 8 and "of train" not in held_out


def test_finetuning_other_models_and_too_long_rows(model: str, training: list[str], tmp_path: Path, capsys: Any):
    run("finetune_gpt2.py", *training, "--model", model, "--steps", "2")
    assert "LlamaForCausalLM" in capsys.readouterr().out
    run("finetune_gpt2.py", *training, "--output", str(tmp_path / "short"))
    assert "to see tiles" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="short has 320 positions: give at most as many --tokens"):
        run("finetune_gpt2.py", *training, "--model", str(tmp_path / "short"), "--tokens", "400")


def test_the_training_picture_is_drawn_from_event_files(training: list[str], tmp_path: Path, capsys: Any):
    for library in ("matplotlib", "tensorboard"):
        pytest.importorskip(library)
    picture, options = tmp_path / "new" / "training.png", ["--steps", "10", "--start", "0.7", "--tolerance", "0.5"]
    run("training_picture.py", *training, *options, "--output", str(tmp_path / "runs"), "--picture", str(picture))
    shown = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert numbers(shown, "aat ") == pytest.approx(numbers(shown, "dense "), rel=0.02)
    curves = runpy.run_path(str(EXAMPLES / "training_picture.py"))["read_events"](tmp_path / "runs" / "aat")
    assert curves["train/loss"].steps == [5, 10] and curves["train/aat_tolerance"].values[0] > 0.5
    density = numbers(shown, "density")
    assert max(density) < 1 and density[0] == pytest.approx(curves["train/aat_density"].start, abs=1e-4)


def test_what_the_callback_costs(shared: list[str], capsys: pytest.CaptureFixture[str]):
    run(CALLBACK_OVERHEAD, *shared, "--steps", "12", "--logging-steps", "2", "--backend", "gather")
    shown = capsys.readouterr().out
    assert "320 tokens a step, a log every 2 steps" in shown and "median of 1 blocks" in shown
    assert min(numbers(shown, "with / without")) > 0
    with pytest.raises(SystemExit, match="give more --steps than 12"):
        run(CALLBACK_OVERHEAD, *shared, "--steps", "10", "--logging-steps", "2")


@pytest.mark.parametrize("name", ["training_picture.py", CALLBACK_OVERHEAD])
def test_trainings_offer_only_what_they_use(name: str, shared: list[str], capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit, match="2"):
        run(name, *shared, "--exact-steps", "3", "--compare")
    assert "unrecognized arguments: --exact-steps 3 --compare" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["training_picture.py", CALLBACK_OVERHEAD])
def test_trainings_refuse_rows_longer_than_the_model(name: str, training: list[str], shared: list[str], tmp_path: Path):
    pytest.importorskip("matplotlib")
    run("finetune_gpt2.py", *training, "--output", str(tmp_path / "short"), "--steps", "1")
    with pytest.raises(SystemExit, match="short has 320 positions: give at most as many --tokens"):
        run(name, *shared, "--model", str(tmp_path / "short"), "--tokens", "400")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[!_]*.py")), ids=lambda path: path.name)
def test_headers_give_the_command(path: Path):
    assert f"python examples/{path.name}" in path.read_text("utf-8").split('"""')[1]


def test_a_new_bert_starts_from_sinusoids():
    weight = torch.empty(300, 32)
    runpy.run_path(str(EXAMPLES / "finetune_bert.py"))["start_from_sinusoids"](weight, 0.02)
    expected = create_sinusoidal_embeddings(*weight.shape, torch.empty(300, 32))
    assert weight.numpy() == pytest.approx(0.02 * 2**0.5 * expected.numpy(), abs=1e-6)
    assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.01)
