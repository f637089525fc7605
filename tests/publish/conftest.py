from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from publishing import SMALL, Bytes, train

import aat_hf
from aat_hf.bench._common import write_csv
from aat_hf.evaluation.predictions import evaluate_predictions


@pytest.fixture(scope="session")
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
