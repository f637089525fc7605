from __future__ import annotations

import pytest
import torch
from fidelity_oracles import exact_root_fidelity, rounding_of_roots
from hypothesis import given
from hypothesis import strategies as st
from random_states import batches, dtypes, few, gaussian, seeds, state, tolerance

from aat_hf.quantum import fidelity as fid
from aat_hf.quantum import states


@few
@given(batches, st.integers(2, 6), st.integers(1, 4), st.integers(1, 4), dtypes, seeds)
def test_mixtures_of_states_need_no_density_matrix(batch, n, m, k, dtype, seed):
    a, b = gaussian((*batch, m, n), dtype, seed), gaussian((*batch, k, n), dtype, seed + 1)
    weights = [torch.softmax(gaussian((*batch, c), dtype.to_real(), seed + c), -1) for c in (m, k)]
    lost, angle = fid.ensemble_infidelity(a, b, *weights), fid.ensemble_bures_angle(a, b, *weights)
    assert lost.shape == angle.shape == batch and lost.dtype == angle.dtype == dtype.to_real()
    atol = tolerance(dtype, 1e-6, 1e-12)
    one = (0,) * len(batch)
    exact = exact_root_fidelity(*(x[one].mT * w[one].sqrt() for x, w in zip((a, b), weights, strict=True)))
    assert float(lost[one]) == pytest.approx(1 - exact**2, abs=atol)
    assert float(angle[one].cos()) == pytest.approx(exact, abs=atol)
    rho, sigma = (states.density_matrix(s, w) for s, w in ((a, weights[0]), (b, weights[1])))
    loose = atol + 4 * rounding_of_roots(rho, sigma, tolerance(dtype, 1.2e-7, 2.3e-16))
    assert ((fid.mixed_infidelity(rho, sigma) - lost).abs() <= loose).all()
    turned = torch.linalg.qr(gaussian((m, m), dtype, seed + 3)).Q  # the same mixture of other states
    other = (turned @ states.weighted_rows(a, weights[0]), b, torch.ones_like(weights[0]), weights[1])
    torch.testing.assert_close(fid.ensemble_infidelity(*other), lost, rtol=0, atol=atol)
    assert fid.ensemble_bures_angle(a, a, weights[0], weights[0]).max() <= tolerance(dtype, 1e-6, 1e-13)


def test_near_mixtures_keep_relative_accuracy_and_have_gradients():
    a = state((3, 8), torch.complex128, 0)
    orthogonal = torch.linalg.qr(a.mT).Q.mT
    for step in (1e-3, 1e-6, 1e-9):  # pure states at this angle in each of three orthogonal planes
        b = torch.cat([orthogonal * torch.cos(torch.tensor(step)), orthogonal * torch.sin(torch.tensor(step))], -1)
        start = torch.cat([orthogonal, 0 * orthogonal], -1)
        assert float(fid.ensemble_bures_angle(start, b)) == pytest.approx(step, rel=1e-6)
        assert float(fid.ensemble_infidelity(start, b)) == pytest.approx(step**2, rel=1e-5)
    x, y = (gaussian((m, 3), torch.complex128, m).requires_grad_() for m in (2, 4))
    for measure in (fid.ensemble_infidelity, fid.ensemble_bures_angle):
        assert torch.autograd.gradcheck(measure, (x, y))
        (gradient,) = torch.autograd.grad(measure(x, x.detach()), x)
        assert gradient.isfinite().all()
