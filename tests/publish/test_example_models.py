"""The published example models: complete, loadable in one line, and with cards that say what their tables say."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, set_seed
from transformers.data import DataCollatorForLanguageModeling

import aat_hf
from aat_hf.data import stdlib_source

MODELS = Path(__file__).parents[2] / "model_cards"
GPT2, BERT = MODELS / "aat-gpt2-long", MODELS / "aat-bert-base-mini"
TOKENS = 4096


def batch(folder: Path) -> dict[str, torch.Tensor]:
    """One row of Python source with its labels, those of masked tokens for BERT."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(stdlib_source(60_000), verbose=False, add_special_tokens=False).input_ids[:TOKENS]
    set_seed(0)
    return dict(DataCollatorForLanguageModeling(tokenizer, mlm=folder == BERT)([ids]))


@pytest.mark.parametrize(("folder", "table"), [(GPT2, "eval/predictions.csv"), (BERT, "eval/masked.csv")])
def test_checksums(folder: Path, table: str):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name.strip(): digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    assert {"README.md", "model.safetensors", table, "LICENSE"} <= listed.keys()
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    assert all(path.stat().st_size <= 16e6 for path in folder.rglob("*"))


def test_the_cards_hold_the_evaluations():
    card = (GPT2 / "README.md").read_text("utf-8")
    with (GPT2 / "eval/predictions.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["first"] == "0" and int(row["last"]) > 2000]
    assert len(rows) == 3
    for row in rows:
        assert f"| {row['tolerance']} | {float(row['density']):.3f} | {float(row['lost']):.4f} |" in card
    card = (BERT / "README.md").read_text("utf-8")
    with (BERT / "eval/masked.csv").open(encoding="utf-8") as file:
        dense, *tiled = csv.DictReader(file)
    assert dense["attention"] == "dense" and len(tiled) == 3
    for row in tiled:
        assert f"| {row['attention']} | {float(row['loss']):.4g} | {float(row['density']):.4g} |" in card


@pytest.mark.parametrize(
    ("folder", "auto", "kind"),
    [(GPT2, AutoModelForCausalLM, "AATGPT2LMHeadModel"), (BERT, AutoModelForMaskedLM, "AATBertForMaskedLM")],
)
def test_they_load_in_one_line_and_tiling_saves_most_tiles(folder: Path, auto: type, kind: str):
    model = auto.from_pretrained(folder, dtype=torch.float32)
    assert type(model).__name__ == kind
    dense = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    aat_hf.configure(model, tolerance=0.05, min_length=0)
    inputs = batch(folder)
    with torch.no_grad():
        loss, reference = (one(**inputs).loss for one in (model, dense))
        with aat_hf.record(model) as report:
            model(**inputs)
    assert loss.item() == pytest.approx(reference.item(), abs=0.02)
    assert report.density < 0.5
    assert report.infidelity[0] <= 1.1 * 0.05


def test_bert_fills_the_mask_of_its_card():
    tokenizer, model = AutoTokenizer.from_pretrained(BERT), AutoModelForMaskedLM.from_pretrained(BERT)
    text = "import numpy as np\n\na = <mask>.zeros((3, 4))\n"
    assert text.replace("\n", "\\n") in (BERT / "README.md").read_text("utf-8")
    inputs = tokenizer(text, return_tensors="pt")
    place = inputs.input_ids[0] == tokenizer.mask_token_id
    with torch.no_grad():
        assert tokenizer.decode(model(**inputs).logits[0, place].argmax(-1)) == "np"
