"""The compiled choice of tiles against the same in plain PyTorch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from aat_hf.tiling.masks import FULL, NONE
from aat_hf.tiling.select import _select_tiles, select_tiles

# equal masses, masses below a unit, and what a broken selector may return
SPECIAL = st.sampled_from([0.0, 1e-30, 1e-13, 0.125, 0.25, 0.3, 1.0, 2.0, -0.5, float("nan"), float("inf")])
MASSES = SPECIAL | st.floats(0, 1, width=32)


@st.composite
def choices(draw):
    """Arguments of `select_tiles`, the mask of single heads or shared."""
    shape = (*draw(array_shapes(min_dims=3, max_dims=3, max_side=3)), draw(st.integers(1, 40)))
    own = (*(draw(st.sampled_from([1, size])) for size in shape[:2]), *shape[2:])
    fractions = st.floats(0, 1, width=32)
    kinds = (
        arrays("float32", shape, elements=MASSES),
        arrays("bool", own),
        arrays("uint8", own, elements=st.integers(NONE, FULL)),
        arrays("float32", shape[:2], elements=fractions),
    )
    mass, forced, states, tolerance = (torch.from_numpy(draw(kind)) for kind in kinds)
    free = torch.from_numpy(draw(arrays("float32", shape[:3], elements=fractions))) if draw(st.booleans()) else None
    return mass, forced, states, tolerance, draw(st.sampled_from([0.3, 0.7, 1.0])), free


@given(choices())
@settings(max_examples=300, deadline=None)
def test_both_ways_choose_the_same_tiles(arguments):
    assert torch.equal(select_tiles(*arguments), _select_tiles(*arguments))
