"""The published example models: complete, loadable in one line, and with cards that say what their tables say."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import aat_hf
from aat_hf.data import stdlib_source

GPT2 = Path(__file__).parents[2] / "model_cards" / "aat-gpt2-long"
TOKENS = 4096


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(GPT2)
    text = stdlib_source(60_000)
    assert tokenizer.decode(tokenizer("def main():").input_ids) == "def main():"
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :TOKENS]


def test_checksums():
    lines = (GPT2 / "SHA256SUMS").read_text().splitlines()
    listed = {name.strip(): digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    assert {"README.md", "model.safetensors", "eval/predictions.csv", "LICENSE"} <= listed.keys()
    for name, digest in listed.items():
        assert hashlib.sha256((GPT2 / name).read_bytes()).hexdigest() == digest, name
    assert all(path.stat().st_size <= 16e6 for path in GPT2.rglob("*"))


def test_the_card_holds_the_evaluation():
    card = (GPT2 / "README.md").read_text("utf-8")
    with (GPT2 / "eval/predictions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["first"] == "0" and int(row["last"]) > 2000]
    assert len(rows) == 3
    for row in rows:
        assert f"| {row['tolerance']} | {float(row['density']):.3f} | {float(row['lost']):.4f} |" in card


def test_it_loads_in_one_line_and_tiling_saves_most_tiles(ids: torch.Tensor):
    model = AutoModelForCausalLM.from_pretrained(GPT2, dtype=torch.float32)
    assert type(model).__name__ == "AATGPT2LMHeadModel"
    dense = AutoModelForCausalLM.from_pretrained(GPT2, dtype=torch.float32, attn_implementation="sdpa")
    aat_hf.configure(model, tolerance=0.05, min_length=0)
    with torch.no_grad():
        loss, reference = (one(ids, labels=ids).loss for one in (model, dense))
        with aat_hf.record(model) as report:
            model(ids)
    assert loss.item() == pytest.approx(reference.item(), abs=0.02)
    assert report.density < 0.5
    assert report.infidelity[0] <= 1.1 * 0.05
