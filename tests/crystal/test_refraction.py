from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from crystal_inputs import batches, dtypes, few, gaussian, precisions, seeds, uniform, within
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq

from aat_hf.crystal import refraction


@few
@given(batches, st.integers(2, 9), st.integers(1, 4), st.integers(1, 5), dtypes, seeds)
def test_index_is_the_root_mean_square_change_of_the_score(batch, n, d, rows, dtype, seed):
    k, q = gaussian(*batch, n, d, seed=seed, dtype=dtype), gaussian(*batch, rows, d, seed=seed + 1, dtype=dtype)
    index = refraction.index_field(k, refraction.query_moment(q, 0.5))
    change = 0.5 * (k.double() @ q.double().mT).diff(dim=-2)  # (..., n - 1, rows)
    expected = change.square().mean(-1).sqrt()
    assert index.dtype == dtype
    torch.testing.assert_close(index.double(), expected, rtol=0, atol=within(dtype, 1e-4, 1e-7))
    path = refraction.optical_path(index)
    assert path.shape == (*batch, n) and (path[..., 0] == 0).all()
    torch.testing.assert_close(path.diff(dim=-1), index, rtol=0, atol=within(dtype, 1e-5, 1e-12))


@few
@given(batches, st.integers(2, 12), st.integers(1, 6), dtypes, seeds)
def test_every_tile_holds_the_same_information(batch, n, tiles, dtype, seed):
    index = uniform(*batch, n - 1, seed=seed, dtype=dtype) * (uniform(*batch, n - 1, seed=seed + 1) < 0.8).to(dtype)
    cuts = refraction.equal_information_boundaries(index, tiles)
    assert cuts.dtype == dtype and (cuts.diff(dim=-1) >= 0).all()
    assert (cuts[..., 0] == 0).all() and (cuts[..., -1] == n - 1).all()
    path = np.concatenate([np.zeros((*batch, 1)), index.double().numpy().cumsum(-1)], -1).reshape(-1, n)
    for one, where in zip(path, cuts.double().reshape(-1, tiles + 1).numpy(), strict=True):
        held = np.diff(np.interp(where, np.arange(n), one))
        np.testing.assert_allclose(held, one[-1] / tiles, atol=within(dtype, 1e-5, 1e-12))


@pytest.mark.parametrize("dtype", precisions)
def test_index_times_tile_length_is_the_same_on_both_sides_of_a_jump(dtype):
    index = torch.tensor([3.0] * 40 + [1.0] * 120, dtype=dtype)  # 240 in 24 tiles: 10 each
    lengths = refraction.equal_information_boundaries(index, 24).diff()
    torch.testing.assert_close(3 * lengths[:12], torch.full((12,), 10, dtype=dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 * lengths[12:], torch.full((12,), 10, dtype=dtype), rtol=1e-5, atol=0)


def test_equal_keys_give_equal_tiles():
    cuts = refraction.equal_information_boundaries(torch.zeros(8), 4)
    assert cuts.tolist() == [0, 2, 4, 6, 8]


@few
@given(batches, st.integers(1, 8), st.integers(0, 8), seeds)
def test_whole_boundaries_leave_no_tile_empty(batch, tiles, more, seed):
    keys = tiles + more
    cuts = (keys * uniform(*batch, tiles + 1, seed=seed)).sort(-1).values
    whole = refraction.whole_boundaries(cuts, keys)
    assert (whole[..., 0] == 0).all() and (whole[..., -1] == keys).all() and (whole.diff(dim=-1) >= 1).all()
    even = torch.linspace(0, keys, tiles + 1)
    assert (refraction.whole_boundaries(even, keys) - even).abs().max() <= 0.5


@pytest.mark.parametrize("indices", [(1.0, 1.5), (1.5, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("dtype", precisions)
def test_the_path_of_least_time_obeys_snell(indices, dtype):
    """Fermat: from (0, 1) to (2, -1), the interface is the line of height 0."""
    n1, n2 = indices

    def slope(x):
        return n1 * x / math.hypot(x, 1) - n2 * (2 - x) / math.hypot(2 - x, 1)

    x = brentq(slope, 0, 2, xtol=1e-15)
    angle = torch.tensor(math.atan(x), dtype=dtype)
    found = refraction.refracted_angle(angle, n1, n2)
    assert float(found) == pytest.approx(math.atan(2 - x), abs=within(dtype, 1e-6, 1e-9))


def test_total_reflection_begins_at_the_critical_angle():
    critical = refraction.critical_angle(torch.tensor(1.5).double(), torch.tensor(1.0).double())
    assert float(critical) == pytest.approx(math.asin(1 / 1.5))
    assert float(refraction.refracted_angle(critical - 1e-9, 1.5, 1.0)) == pytest.approx(math.pi / 2, abs=1e-3)
    beyond = (critical + 1e-3).requires_grad_()
    refracted = refraction.refracted_angle(beyond, 1.5, 1.0)
    (gradient,) = torch.autograd.grad(refracted, beyond)
    assert refracted.isnan() and gradient == 0
    assert float(refraction.critical_angle(torch.tensor(1.0), torch.tensor(2.0))) == pytest.approx(math.pi / 2)


def axis(h):
    return torch.arange(-1 + h / 2, 1, h, dtype=torch.float64)


@pytest.mark.parametrize("dtype", precisions)
def test_travel_times_from_a_disc_in_a_uniform_medium(dtype):
    pytest.importorskip("skfmm")
    h, n = 0.02, 2.5
    x, y = torch.meshgrid(axis(h), axis(h), indexing="ij")
    distance = torch.hypot(x, y) - 0.2
    found = refraction.travel_times(torch.full_like(x, n).to(dtype), distance.to(dtype), h)
    assert found.dtype == dtype
    outside = distance > 0
    assert (found.double() - n * distance)[outside].abs().max() <= 2 * h * n


def test_travel_times_across_an_interface_converge_to_fermat():
    pytest.importorskip("skfmm")
    n1, n2, depth, across = 1.0, 2.0, 0.8, 0.6
    radius = 0.1  # start on a circle about (-0.5, 0), so that there is no corner at the source

    def time(y):
        return n1 * (math.hypot(0.5, y) - radius) + n2 * math.hypot(depth, across - y)

    y = brentq(lambda y: n1 * y / math.hypot(0.5, y) - n2 * (across - y) / math.hypot(depth, across - y), 0, across)
    errors = []
    for h in (0.04, 0.02, 0.01):
        x, v = torch.meshgrid(axis(h), axis(h), indexing="ij")
        index = torch.where(x < 0, n1, n2)
        found = refraction.travel_times(index, torch.hypot(x + 0.5, v) - radius, h)
        i, j = int((depth + 1) / h - 0.5), int((across + 1) / h - 0.5)
        at = [found[i + a, j + b] for a in (0, 1) for b in (0, 1)]  # the point lies in the middle of four
        errors.append(abs(float(sum(at)) / 4 - time(y)))
        assert errors[-1] <= 2 * h * n2
    assert errors[2] < errors[0] / 2


def test_travel_times_refuse_what_makes_no_sense(monkeypatch):
    ones = torch.ones(3, 3)
    for index, front, message in ((ones, ones[:2], "one shape"), (0 * ones, ones, "positive"), (ones, ones, "sign")):
        with pytest.raises(ValueError, match=message):
            refraction.travel_times(index, front)

    def missing(name, *args):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r'pip install "aat-hf\[crystal\]"'):
        refraction.travel_times(ones, torch.tensor([-1.0, 0.5, 1.0]).expand(3, 3))


def test_gradients():
    k, q = gaussian(5, 3).requires_grad_(), gaussian(4, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda k, q: refraction.index_field(k, refraction.query_moment(q)), (k, q))
    index = (uniform(7) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: refraction.equal_information_boundaries(x, 3), (index,))
    angle = torch.tensor([0.1, 0.4]).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: refraction.refracted_angle(a, 1.2, 1.0), (angle,))
    same = torch.ones(3, 2).double().requires_grad_()
    (gradient,) = torch.autograd.grad(refraction.index_field(same, torch.eye(2).double()).sum(), same)
    assert torch.equal(gradient, torch.zeros(3, 2).double())


def test_too_few_keys_or_tiles_are_refused():
    with pytest.raises(ValueError, match="two keys"):
        refraction.equal_information_boundaries(torch.zeros(0), 1)
    with pytest.raises(ValueError, match="0 tiles"):
        refraction.equal_information_boundaries(torch.ones(3), 0)
    with pytest.raises(ValueError, match="cannot share 2 keys"):
        refraction.whole_boundaries(torch.arange(4.0), 2)
