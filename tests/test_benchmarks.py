"""`aat bench`: the commands run on a tiny model, and write tables, CSV files and pictures."""

from __future__ import annotations

import csv

import pytest
from matplotlib.image import imread
from tiny_model import save_tiny

from aat_hf import cli
from aat_hf.bench import _plots


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


CASES = [
    (["decode", "--lengths", "900", "2500", "--layers", "1", "--queries", "2", "--rounds", "1",
      "--growth"], "DynamicCache ms", 2),
    (["quality", "--tokens", "700", "--tolerances", "0.3", "0.1", "--selectors", "mix", "--settings",
      '{"min_length": 0, "dense_prefix": 0, "max_kept": 1.0, "backend": "cpu"}'], "KL", 2),
    (["selection", "--tokens", "700", "--tolerances", "0.3", "--selectors", "mix"], "/ oracle", 2 * 2 * 4),
    (["model", "--tokens", "700", "--tasks", "prefill", "train", "--rounds", "1"], "train", 2),
    (["attention", "--lengths", "1400", "--layers", "1", "--tolerances", "0.3", "--rounds", "1", "--profile"],
     "choose and repair", 1),
]  # fmt: skip


@pytest.mark.parametrize("command,shown,lines", CASES, ids=[command[0] for command, *_ in CASES])
def test_on_a_model(tiny, tmp_path, capsys, command, shown, lines):
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    assert cli.main(["bench", *command, "--model", tiny, "--out", str(table), "--plot", str(picture)]) == 0
    assert shown in capsys.readouterr().out
    with table.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == lines
    assert imread(picture).std() > 0.01  # something is drawn


def test_kernels_are_drawn_against_density(tmp_path, capsys):
    picture = tmp_path / "kernels.svg"
    command = ["bench", "attention", "--lengths", "300", "--densities", "1", "0.5", "--heads", "2"]
    assert cli.main([*command, "--head-dim", "16", "--rounds", "1", "--plot", str(picture)]) == 0
    assert "density" in picture.read_text()


def test_heads_that_cannot_share_keys_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "attention", "--heads", "16", "--kv-heads", "9"])
    assert "--heads 16: must be a multiple of --kv-heads 9" in capsys.readouterr().err


def test_a_picture_without_matplotlib_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    def missing(name, extra):
        raise ImportError(f"pip install 'aat-hf[{extra}]'")

    monkeypatch.setattr(_plots, "optional_module", missing)
    with pytest.raises(ImportError, match="viz"):
        cli.main(["bench", "quality", "--model", "nowhere", "--plot", str(tmp_path / "a.png")])
