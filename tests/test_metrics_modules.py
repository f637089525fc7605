"""Metrics loaded by path without a network, against the numbers of the library itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import byte_tokenizer, tiny_llama

import aat_hf
from aat_hf.compare import ComparisonError
from aat_hf.config import AATConfig
from aat_hf.metrics import METRICS, load_metric, metric_path

evaluate = pytest.importorskip("evaluate")
TEXTS = ["some text that is long enough " * 12, "and another one " * 9]


@pytest.fixture
def inputs(small: AATConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_CACHE", tmp_path / "evaluate")
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    model = tiny_llama()
    aat_hf.configure(model, **small.to_dict())
    return {"predictions": TEXTS, "model": model, "tokenizer": byte_tokenizer()}


@pytest.mark.parametrize("name", METRICS)
def test_modules_are_where_the_package_says(name: str):
    assert (Path(metric_path(name)) / f"{name}.py").is_file()


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match=r"no metric 'bleu': choose one of aat_density"):
        load_metric("bleu")


def test_density(inputs: dict[str, Any]):
    found = load_metric("aat_density").compute(**inputs, tolerance=0.5)
    assert 0 < found["density_p10"] <= found["density"] <= found["density_p90"] < 1
    assert found["tiled"] == 1
    exact = load_metric("aat_density").compute(**inputs, tolerance=0.0)
    assert exact == {"density": 1, "density_p10": 1, "density_p90": 1, "tiled": 0}


def test_infidelity_is_that_of_a_record(inputs: dict[str, Any], small: AATConfig):
    found = load_metric("aat_infidelity").compute(**inputs, tolerance=0.5)
    model, tokenizer = inputs["model"], inputs["tokenizer"]
    model.set_attn_implementation("aat")
    aat_hf.configure(model, tolerance=0.5)
    with aat_hf.record(model) as report:
        for text in TEXTS:
            model(torch.tensor([tokenizer(text).input_ids]), use_cache=False)
    assert found["infidelity"], found["half_width"] == pytest.approx(report.infidelity)
    assert found["infidelity"] > 0.01 and found["heads_over_tolerance"] == 0 and found["tolerance"] == 0.5
    exact = load_metric("aat_infidelity").compute(**inputs, tolerance=0.0)
    assert exact == {"infidelity": None, "half_width": None, "heads_over_tolerance": None, "tolerance": 0}


def test_perplexity_is_that_of_the_models_own_loss(inputs: dict[str, Any]):
    model, tokenizer = inputs["model"], inputs["tokenizer"]
    metric = load_metric("long_perplexity")
    found = metric.compute(**inputs, implementation="sdpa", max_tokens=100, buckets=3)
    ids = [torch.tensor([tokenizer(text).input_ids[:100]]) for text in TEXTS]
    with torch.inference_mode():
        losses = [float(model(one, labels=one).loss) for one in ids]
    assert found["perplexity"] == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)
    assert found["tokens"] == 2 * 99
    logs = [math.log(value) for value in found["by_position"]]
    assert sum(logs) / 3 == pytest.approx(sum(losses) / 2, rel=1e-5)
    tiled = metric.compute(**inputs, tolerance=0.0)
    assert tiled["perplexity"] == pytest.approx(metric.compute(**inputs, implementation="sdpa")["perplexity"], rel=1e-5)


def test_the_model_is_left_as_it_was(inputs: dict[str, Any], small: AATConfig):
    model = inputs["model"]
    for name in METRICS:
        load_metric(name).compute(**inputs, tolerance=0.3)
        assert aat_hf.configure(model) == small
        assert model.config._attn_implementation == "sdpa"


def test_a_text_without_predictions_is_named(inputs: dict[str, Any]):
    with pytest.raises(ComparisonError, match="text 1 has 1 tokens"):
        load_metric("long_perplexity").compute(**inputs | {"predictions": ["text", "a"]})
