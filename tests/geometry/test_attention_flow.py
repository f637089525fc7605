from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aat_hf.geometry import fisher
from aat_hf.geometry.attention_flow import attention_flow, positions


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 5), st.integers(1, 3), st.integers(2, 9), st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 2**20)
)
def test_length_energy_and_displacement(layers, batch, n, sharpness, seed):
    torch.manual_seed(seed)
    rows = torch.softmax(sharpness * torch.randn(layers, batch, n, dtype=torch.float64), -1)
    flow = attention_flow(rows)
    assert flow.speed.shape == (layers - 1, batch) and flow.velocity.shape == (layers - 1, batch, n)
    speed = 2 * torch.acos((rows[:-1] * rows[1:]).sqrt().sum(-1).clamp(max=1))
    assert torch.allclose(flow.speed, speed, atol=1e-6)  # arccos is no better near 1
    assert torch.allclose(flow.length, flow.speed.sum(0))
    assert (flow.displacement <= flow.length + 1e-12).all()  # triangle inequality
    assert (flow.energy >= flow.length**2 / (2 * (layers - 1)) - 1e-12).all()  # Cauchy-Schwarz
    if sharpness <= 1:
        assert torch.allclose(fisher.inner(rows[:-1], flow.velocity).sqrt(), flow.speed, atol=1e-9)
        assert torch.allclose(fisher.expmap(rows[:-1], flow.velocity), rows[1:], atol=1e-12)


def test_a_great_circle_is_straight_and_of_constant_speed():
    p, r = torch.softmax(torch.randn(2, 4, 7, dtype=torch.float64), -1)
    rows = torch.stack([fisher.geodesic(p, r, t) for t in (0.0, 0.25, 0.5, 0.75, 1.0)])
    flow = attention_flow(rows)
    assert torch.allclose(flow.length, flow.displacement, rtol=1e-10)
    assert torch.allclose(flow.energy, flow.length**2 / 8, rtol=1e-10)
    between = positions(rows, torch.tensor([0.0, 0.5, 2.0, 3.1, 4.0]))
    expected = torch.stack([fisher.geodesic(p, r, t) for t in (0.0, 0.125, 0.5, 0.775, 1.0)])
    assert torch.allclose(between, expected, atol=1e-12)


def test_layers_that_attend_alike_do_not_move():
    rows = torch.softmax(torch.randn(5), -1).expand(3, 5)
    flow = attention_flow(rows)
    assert flow.length == 0 and flow.energy == 0 and flow.velocity.abs().max() == 0


def test_bad_paths_are_errors():
    with pytest.raises(ValueError, match="two layers"):
        attention_flow(torch.ones(1, 4))
    with pytest.raises(ValueError, match="times"):
        positions(torch.ones(3, 4) / 4, torch.tensor([2.5]))
