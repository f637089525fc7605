"""`aat bench`: the commands run on a tiny model, and write tables, CSV files and pictures."""

from __future__ import annotations

import csv

import pytest
import torch
from matplotlib.image import imread
from tiny_model import save_tiny

from aat_hf import cli
from aat_hf.bench import _plots, selection
from aat_hf.bench._common import mask_and_scale
from aat_hf.bench._methods import Settings, WholeMatrices, ablations
from aat_hf.config import AATConfig
from aat_hf.errors import UnsupportedAttentionError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny"))


CASES = [
    (["decode", "--lengths", "900", "2500", "--layers", "1", "--queries", "2", "--rounds", "1",
      "--growth"], "DynamicCache ms", 2),
    (["heads", "--tokens", "700", "--tolerances", "0.3", "--selectors", "mix"], "/ oracle", 2 * 2 * 4),
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


TILED = '{"min_length": 0, "dense_prefix": 0, "max_kept": 1.0, "backend": "cpu"}'


def test_a_frontier_of_several_scenes(tiny, tmp_path, capsys):
    table, picture = tmp_path / "a.csv", tmp_path / "a.png"
    command = ["bench", "selection", "--scene", tiny, "code", "768", "--scene", tiny, "code", "1024"]
    how = ["--selectors", "mix", "oracle", "--settings", TILED, "--groupings", "16", "16/256/coordinate"]
    files = ["--out", str(table), "--plot", str(picture)]
    assert cli.main([*command, *how, "--tolerances", "0.6", "0.4", *files]) == 0
    shown = capsys.readouterr().out
    assert f"{tiny}, code, 1024 tokens" in shown and f"mix {TILED}" in shown
    assert "mix, 16 by content in 256, by coordinate" in shown
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 * 2 + 2 * 2)
    timed = [float(row["select_seconds"]) for row in rows if TILED in row["method"]]
    assert len(timed) == 8 and all(seconds > 0 for seconds in timed)
    for loose, tight in zip(rows[0::2], rows[1::2], strict=True):  # tolerances .6 and .4 of one method
        assert loose["method"] == tight["method"]
        assert float(loose["density"]) < float(tight["density"]) and 0.2 < float(tight["lost"]) < 0.44
    assert imread(picture).std() > 0.01


def test_every_ablation_runs(tiny, capsys):
    """Those of settings tile a short text first, then go to exact attention at this length; orders are computed."""
    assert cli.main(["bench", "selection", "--scene", tiny, "code", "768", "--selectors", "--ablations"]) == 0
    shown = capsys.readouterr().out
    for method in ("mix, one pass", "mix, tiles of 64", "mix, 64 by content in 1024", "oracle, 16 in place"):
        assert f"| {method} |" in shown


def test_each_ablation_changes_one_setting():
    default, changed = AATConfig().to_dict(), []
    for method in ablations(AATConfig().tolerance):
        config = AATConfig(selector=method.selector, tolerance=method.tolerance).replace(**method.changes).to_dict()
        changed.append([(name, value) for name, value in config.items() if value != default[name]])
    assert all(len(changes) == 1 for changes in changed) and len({changes[0] for changes in changed}) == len(changed)


def test_scores_that_are_more_than_products_are_refused():
    q, k = torch.zeros(1, 2, 8, 4), torch.zeros(1, 1, 8, 4)
    mask, scale = mask_and_scale(q, k, None, {"scaling": 0.3, "softcap": None})
    assert mask.kind == "causal" and scale == 0.3
    for more in ({"softcap": 5.0}, {"s_aux": torch.zeros(2)}):
        with pytest.raises(UnsupportedAttentionError, match="softcapped"):
            mask_and_scale(q, k, None, more)
    with pytest.raises(UnsupportedAttentionError, match="bias"):
        mask_and_scale(q, k, torch.randn(1, 1, 8, 8), {})


def test_all_is_every_scene_and_every_ablation():
    args = selection._arguments(["--all"])
    assert {scene[:2] for scene in args.scene} == {("smollm2", "code"), ("smollm2", "prose"), ("qwen05", "code"),
                                                   ("gemma3", "code")}  # fmt: skip
    kinds = [type(method) for method in selection.methods(args, 4096)]
    assert Settings in kinds and WholeMatrices in kinds
    assert {type(method) for method in selection.methods(args, 16384)} == {Settings}


@pytest.mark.parametrize("scene", [["nowhere", "code", "many"], ["nowhere", "code", "700"]])
def test_scenes_that_cannot_be_run_are_refused_before_the_work(scene, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "selection", "--scene", *scene, "--groupings", "16"])
    assert "must be" in capsys.readouterr().err


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
        cli.main(["bench", "selection", "--scene", "nowhere", "code", "4096", "--plot", str(tmp_path / "a.png")])
