from __future__ import annotations

import pytest
import scipy.linalg
import torch
from random_states import density, gaussian, hermitian, unitary

from aat_hf.quantum import _spectral


@pytest.mark.parametrize("function", [_spectral.sqrt_psd, _spectral.log_psd, _spectral.exp_minus_i])
@pytest.mark.parametrize("spectrum", [[0.7, 0.2, 0.1], [0.4, 0.4, 0.2], [1.0, 1.0, 1.0], [1.0, 1 - 1e-9, 1e-6]])
def test_derivatives_at_separate_near_and_equal_eigenvalues(function, spectrum):
    u = unitary(3, 0)
    matrix = ((u * torch.tensor(spectrum, dtype=torch.float64)) @ u.mH).requires_grad_()
    atol = 1e-5 if min(spectrum) > 1e-3 else 1.0  # derivatives near 1e6 there: the finite differences are coarse
    eps = 1e-7 if min(spectrum) > 1e-3 else 1e-10
    assert torch.autograd.gradcheck(
        lambda x: function((x + x.mH) / 2), (matrix,), eps=eps, atol=atol, rtol=1e-3, check_forward_ad=True
    )


def test_values_against_scipy():
    rho = density((5,), 5, torch.complex128, 0)
    for ours, theirs in (
        (_spectral.sqrt_psd(rho), scipy.linalg.sqrtm(rho.numpy())),
        (_spectral.log_psd(rho), scipy.linalg.logm(rho.numpy())),
        (_spectral.exp_minus_i(rho), scipy.linalg.expm(-1j * rho.numpy())),
    ):
        torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-12)


def test_lyapunov_solves_its_equation_and_can_be_differentiated_twice():
    rho, right = density((3, 4), 4, torch.complex128, 0), hermitian((3, 4), torch.complex128, 1)
    x = _spectral.lyapunov(rho, right)
    torch.testing.assert_close(rho @ x + x @ rho, right)
    shared = _spectral.lyapunov(rho[0], right)  # one matrix for a batch of right sides
    torch.testing.assert_close(shared[2], _spectral.lyapunov(rho[0], right[2]))
    inputs = rho[0, :3, :3].clone().requires_grad_(), right[:2, :3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(_spectral.lyapunov, inputs)
    assert torch.autograd.gradgradcheck(_spectral.lyapunov, inputs)


def test_second_derivatives_are_refused_not_wrong():
    h = hermitian((3,), torch.float64, 0)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.func.hessian(lambda t: _spectral.exp_minus_i(t * h)[0, 1].abs())(torch.tensor(0.3, dtype=torch.float64))
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_spectral.exp_minus_i(t * h)[0, 1].abs(), t, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        slope.backward()


def test_transforms_of_torch_func():
    h = gaussian((2, 3, 3), torch.float64, 0)
    h = h + h.mT

    def element(m):
        return _spectral.exp_minus_i(m)[0, 1].real

    batched = torch.func.vmap(torch.func.grad(element))(h)
    torch.testing.assert_close(batched, torch.stack([torch.func.grad(element)(m) for m in h]))
    torch.testing.assert_close(batched, torch.func.vmap(torch.func.jacfwd(element))(h))
    batched = torch.func.vmap(_spectral.exp_minus_i)(h)
    torch.testing.assert_close(batched, _spectral.exp_minus_i(h))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_eigenvalues_that_are_rounding_count_as_zero(dtype):
    """A projector rounded to its dtype has eigenvalues of +-1e-8 (+-1e-17), whose roots would be 1e-4 (1e-8)."""
    x = gaussian((64, 1), torch.complex128, 0)
    rho = ((x @ x.mH) / x.abs().square().sum()).to(dtype)
    root = _spectral.sqrt_psd(rho)
    torch.testing.assert_close(root.to(dtype), rho, rtol=0, atol=torch.finfo(dtype).eps)
    assert torch.linalg.matrix_rank(root, tol=1e-12) == 1
