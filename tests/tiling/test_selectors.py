from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inputs import peaked

from aat_hf.config import AATConfig
from aat_hf.kernels import cpu_rows
from aat_hf.kernels.cpu_row_data import Rows
from aat_hf.tiling.masks import FULL, NONE, causal_mask
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import SELECTORS, _blend, blend, get_selector, mix, moments, oracle


def scene(**settings):
    q, k, _ = peaked(2, 4, 2, 333, 333, 24)
    return Scene.of(q, k, causal_mask(333, 333, q.device), 0.25, AATConfig(**settings))


def test_blends_by_hand():
    mass = torch.tensor([[[[1.0, 0, 0], [0.5, 0.5, 0], [0, 0.2, 0.8]]]])
    states = torch.tensor([[[[FULL, NONE, NONE], [FULL, FULL, NONE], [FULL, FULL, FULL]]]], dtype=torch.uint8)
    found = blend(mass, mass, states, 0.5)[0, 0]
    assert torch.allclose(found[0], torch.tensor([1.0, 0, 0]))  # what it cannot see it does not get
    assert torch.allclose(found[1], torch.tensor([1.0, 0.6, 0]) / 1.6)
    assert torch.allclose(found[2], torch.tensor([0.25, 0.45, 0.8]) / 1.5)
    assert torch.equal(blend(mass, mass, states, 0.0), mass)


@pytest.mark.parametrize("tiles", [1, 5, 16, 20, 64, 77])
@pytest.mark.parametrize("batch, heads", [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_blends_keep_the_mean_of_a_row_and_are_those_of_torch(batch, heads, tiles):
    a, b = torch.rand(2, 2, 3, 7, tiles) / 2 / tiles
    a[0, 1, 3] = b[0, 1, 3] = 0
    states = torch.randint(NONE, FULL + 1, (batch, heads, 7, tiles), dtype=torch.uint8)
    states[..., 0] = FULL
    a, b = (x.masked_fill(states == NONE, 0) for x in (a, b))
    found, before = blend(a, b, states), (a + b).sum(-1) / 2
    assert torch.allclose(found.sum(-1)[before > 0], before[before > 0]) and bool((found >= 0).all())
    assert torch.allclose(found, _blend(a, b, states, 0.1))


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_estimates_are_probabilities_of_what_is_seen(name):
    seen = scene()
    found = get_selector(name)(seen)
    assert found.shape == (2, 4, 6, 21) and bool((found >= 0).all())
    assert torch.allclose(found.sum(-1), torch.ones(()), atol=1e-4)
    assert float(found.masked_fill(seen.states != NONE, 0).abs().max()) == 0


def test_mix_is_the_mean_of_both_with_neighbours():
    seen = scene()
    assert torch.equal(mix(seen), blend(get_selector("measured")(seen), moments(seen), seen.states))


def test_measured_rows_approach_all_rows(monkeypatch):
    monkeypatch.setattr(cpu_rows, "Rows", lambda *fields: Rows(*fields[:-1], False))  # without rough exponentials
    seen = scene()
    truth = oracle(seen)
    few, most, all_of_them = (
        float((get_selector("measured")(replace(seen, config=AATConfig(sample_stride=n))) - truth).abs().mean())
        for n in (32, 2, 1)
    )
    assert few > 2 * most > 5 * all_of_them


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match=r"must be one of .*mix"):
        get_selector("nearest")
