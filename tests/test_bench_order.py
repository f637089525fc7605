"""`aat bench order` and `aat bench heads --certificates`: what they say of a head is what brute force says."""

from __future__ import annotations

import csv

import pytest
import torch
from inputs import peaked
from tiny_model import save_tiny

from aat_hf import cli
from aat_hf.bench._order_trial import LEAF, Grouping, Head, Layout, choose
from aat_hf.config import AATConfig
from aat_hf.tiling.masks import causal_mask
from aat_hf.tiling.order import content_order
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import get_selector

KEYS, CONFIG = 640, AATConfig(tolerance=0.1, dense_prefix=128, max_kept=1.0)
GROUPINGS = [Grouping(16), Grouping(64), Grouping(16, 128), Grouping(64, 256), Grouping(16, 256, "coordinate")]


@pytest.fixture
def head():
    q, k, v = peaked(1, 1, 1, KEYS, KEYS, 16, torch.float64)
    trees = [grouping.tree for grouping in GROUPINGS if grouping.tree is not None]
    orders = {(chunk, axis): content_order(k, chunk, LEAF, CONFIG.sink_keys, axis)[0, 0] for chunk, axis in trees}
    return Head(q, k, v, causal_mask(KEYS, KEYS, q.device), 0.25, orders)


def layout_of(grouping):
    return Layout.of(grouping, causal_mask(KEYS, KEYS, torch.device("cpu")), CONFIG)


@pytest.mark.parametrize("grouping", GROUPINGS, ids=str)
def test_what_is_kept_lost_and_computed_agrees_with_whole_attention(head, grouping):
    layout = layout_of(grouping)
    masses = head.masses(layout)
    exact = head.estimate(layout, masses, "oracle")
    kept = choose(layout, exact, exact)
    row_kept = layout.rows(kept, head.every)
    lost = masses.masked_fill(row_kept, 0.0).sum(-1)
    assert (lost.view(-1, 64).mean(-1) <= CONFIG.tolerance).all() and 0 < kept.sum() < (layout.states != 0).sum()
    seen = row_kept.repeat_interleave(grouping.key_tile, 1)
    if grouping.tree is not None:
        inside = layout.rows(layout.closed, head.every).repeat_interleave(grouping.key_tile, 1)
        assert inside.any()
        back = head.orders[grouping.tree].argsort()
        seen = torch.where(inside[:, back], seen[:, back], seen)  # chunks are closed as wholes
    future = torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1)
    scores = (0.25 * head.q[0, 0] @ head.k[0, 0].mT).masked_fill(future, -torch.inf)
    weights = scores.softmax(-1)
    torch.testing.assert_close(lost, weights.masked_fill(seen, 0.0).sum(-1), rtol=1e-5, atol=1e-8)
    output = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ head.v[0, 0]
    torch.testing.assert_close(head.output(layout, kept, head.every), output, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("selector", ["oracle", "moments", "mix"])
@pytest.mark.parametrize("tile", [16, 64])
def test_in_place_the_estimates_are_those_of_the_selectors(head, selector, tile):
    layout = layout_of(Grouping(tile))
    mask = causal_mask(KEYS, KEYS, head.q.device)
    expected = get_selector(selector)(Scene.of(head.q, head.k, mask, 0.25, CONFIG.replace(key_tile=tile)))
    found = head.estimate(layout, head.masses(layout), selector)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_a_head_that_loses_too_much_is_chosen_again(head):
    layout = layout_of(Grouping(16))
    exact = head.estimate(layout, head.masses(layout), "oracle")
    flattering = exact * torch.where(layout.forced, 1.0, 0.3)
    kept = choose(layout, flattering, exact)
    assert float(exact.masked_fill(kept, 0.0).sum(-1).mean()) <= 1.1 * CONFIG.tolerance


@pytest.mark.parametrize("text", ["48", "64/96", "16/8", "8", "64/512/3", "64/512/principal/3", "x"])
def test_groupings_that_no_tree_has_are_refused(text):
    with pytest.raises(ValueError):
        Grouping.parse(text)


def test_groupings_are_read_from_text():
    assert Grouping.parse("16/1024/coordinate") == Grouping(16, 1024, "coordinate")
    assert Grouping.parse("64/512") == Grouping(64, 512)


def test_of_a_model(tmp_path, capsys):
    model, table = save_tiny(tmp_path / "tiny"), tmp_path / "a.csv"
    command = ["bench", "order", "--model", model, "--tokens", "1600", "--every", "1", "--tolerances", "0.3"]
    assert cli.main([*command, "--groupings", "16", "64/512", "--estimates", "mix", "--out", str(table)]) == 0
    shown = capsys.readouterr().out
    assert "0.3 mix, 64 by content in 512" in shown and "of SDPA's" in shown
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 2 and all(0 < float(row["density"]) <= 1 for row in rows)


def test_tokens_that_fill_no_query_tile_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "order", "--tokens", "700"])
    assert "multiple of 64" in capsys.readouterr().err


def test_certificates_of_a_model(tmp_path, capsys):
    command = ["bench", "heads", "--model", save_tiny(tmp_path / "tiny"), "--tokens", "1600", "--certificates"]
    table = tmp_path / "a.csv"
    assert cli.main([*command, "--selectors", "mix", "--tolerances", "0.3", "--out", str(table)]) == 0
    assert "culls certified by the ball" in capsys.readouterr().out
    with table.open(newline="") as file:
        shares = [float(row["either"]) for row in csv.DictReader(file)]
    assert len(shares) == 2 * 2 * 4 and all(0 <= share <= 1 for share in shares if share == share)
