"""Margins: whatever is lost, its mean is what the recursion says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aat_hf.tiling import margins
from aat_hf.tiling.margins import RATE, Margins

TOLERANCE = 0.05


def begun(batch=1, heads=1):
    found = Margins()
    found.next_step(batch, heads)
    return found


@given(st.lists(st.floats(0, 1), min_size=1, max_size=300))
def test_the_mean_loss_is_bounded_whatever_the_losses_are(losses):
    """As long as the upper bound is not met: the sum of the moves is the change of the logarithm."""
    found, start, seen = begun(), begun().log[0], []
    for lost in losses:
        found.learn(np.array([lost]), TOLERANCE)
        seen.append(lost)
        if found.log[0] == margins._BOUNDS[1]:
            return
    bound = TOLERANCE * (1 + (found.log[0] - start) / (RATE * len(seen)))
    assert np.mean(seen) <= bound + 1e-9
    if found.log[0] > margins._BOUNDS[0] and len(seen) < 10:  # too few to have met the lower bound
        assert np.mean(seen) == pytest.approx(bound)


@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_the_mean_loss_comes_to_the_tolerance(slope):
    """A head that loses less the larger its margin is, with noise, and much more than predicted at first."""
    found, rng = begun(), np.random.default_rng(0)
    losses = []
    for _ in range(3000):
        lost = min(1.0, 0.5 * np.exp(-slope * found.log[0]) * rng.exponential())
        found.learn(np.array([lost]), TOLERANCE)
        losses.append(lost)
    assert np.mean(losses) == pytest.approx(TOLERANCE, rel=0.05)


def test_exact_steps_count_as_losing_nothing():
    found, other = begun(1, 2), begun(1, 2)
    found.learn_exact(TOLERANCE)
    other.learn(np.zeros(2), TOLERANCE)
    assert found.log.tolist() == other.log.tolist() == [margins._START - RATE] * 2


def test_what_is_expected_is_the_mean_of_recent_losses():
    found = begun(1, 2)
    for lost in (0.1, 0.2, 0.6):
        found.learn(np.array([lost, np.nan]), TOLERANCE)
    found.learn_exact(TOLERANCE)  # says nothing of steps that leave tiles out
    assert found.expected == pytest.approx([0.3, 0.0])
    assert found.log[1] == margins._START - RATE  # a query without keys moves nothing
    for _ in range(200):
        found.learn(np.array([0.01, 0.0]), TOLERANCE)
    assert found.expected[0] == pytest.approx(0.01, abs=1e-4)


def test_bounds():
    found = begun(1, 2)
    for _ in range(100):
        found.learn(np.array([0.0, 1.0]), 0.01)
    assert found.log.tolist() == list(margins._BOUNDS)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_layers_that_share_keys_are_all_measured(layers):
    found, measured = Margins(), [0] * layers
    for step in range(layers * 17 * 4):
        measured[step % layers] += found.next_step(1, 1)
    assert min(measured) >= 4 and sum(measured) == 4 + layers * 4


def test_another_batch_begins_anew():
    found = begun(2, 3)
    found.learn(np.full(6, 0.5), TOLERANCE)
    assert found.next_step(3, 2) and found.log.tolist() == [margins._START] * 6 and found.steps == 1


def test_select():
    found = Margins()
    found.select(torch.tensor([0, 0]))  # before any step
    found = begun(3, 2)
    found.log[:], found.expected[:] = np.arange(6), np.arange(6) / 10
    found.select(torch.tensor([2, 0, 2, 1]))
    assert found.log.tolist() == [4, 5, 0, 1, 4, 5, 2, 3]
    assert (found.expected == found.log / 10).all()
    found.next_step(4, 2)
    assert found.log[0] == 4 and found.steps == 2
