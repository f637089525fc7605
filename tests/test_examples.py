"""Every example runs offline on a tiny model and prints what it measured."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, caches of its own, and settings with which short texts are tiled."""
    datasets, evaluate = pytest.importorskip("datasets"), pytest.importorskip("evaluate")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    settings = {
        "MIN_LENGTH": 0,
        "DENSE_PREFIX": 0,
        "QUERY_TILE": 32,
        "KEY_TILE": 32,
        "BACKEND": "gather",
        "MAX_KEPT": 1,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"AAT_{name}", str(value))


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


def test_generation_streams_with_its_metrics(model: str, capsys: pytest.CaptureFixture[str]):
    run("streaming_generation.py", "--model", model, "--tokens", "300", "--new-tokens", "40", "--tolerance", "0.5")
    shown = capsys.readouterr()
    assert "[first token after" in shown.err and "infidelity" in shown.err and "[32 tokens," in shown.err
    assert "300 tokens read, 40 generated" in shown.out
    assert "milliseconds of attention: " in shown.out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_headers_give_the_command(path: Path):
    assert f"python examples/{path.name}" in path.read_text("utf-8").split('"""')[1]
