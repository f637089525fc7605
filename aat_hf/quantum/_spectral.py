"""Functions of Hermitian matrices whose derivatives are right where eigenvalues coincide.

A user of attention gets gradients of fidelities, entropies and evolutions of heads without NaN: density matrices of
attention are rank deficient and often degenerate, where differentiating through eigenvectors divides by zero. The
derivative is the Daleckii-Krein formula, V [(V^H E V) * f[l_i, l_j]] V^H with the divided differences of f.

Source: N. J. Higham, *Functions of Matrices* (SIAM 2008), theorem 3.11.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aat_hf.quantum._precision import input_epsilon, widened

_DOUBLE = torch.finfo(torch.float64).eps
_Pair = tuple[Tensor, Tensor]
_ONCE = "square roots, logarithms and exponentials of Hermitian matrices have first derivatives only"


def hermitian(matrix: Tensor) -> Tensor:
    """Hermitian part of `matrix` (..., n, n), in float64 or complex128."""
    wide = widened(matrix)
    return (wide + wide.mH) / 2


def noise_floor(matrix: Tensor) -> Tensor:
    """Size up to which an eigenvalue of `matrix` (..., n, n) cannot be told from 0: (...).

    Rounding the entries to a relative eps moves every eigenvalue by at most eps ||matrix||_F (Weyl), the eigensolver
    in double precision by at most about n eps64 ||matrix||_F.
    """
    frobenius = torch.linalg.matrix_norm(widened(matrix))
    return (input_epsilon(matrix) + matrix.shape[-1] * _DOUBLE) * frobenius.detach()


def sqrt_psd(matrix: Tensor) -> Tensor:
    """Square root of a positive semidefinite `matrix` (..., n, n), in double precision.

    Eigenvalues up to `noise_floor` count as 0: their square roots (1e-4 for 1e-8) would be noise made large. The
    derivative leaves out the block inside the kernel, where it does not exist.
    """
    return _mapped(hermitian(matrix), noise_floor(matrix), _sqrt)


def log_psd(matrix: Tensor) -> Tensor:
    """Logarithm of a positive semidefinite `matrix` (..., n, n) on its support and 0 on its kernel, double precision.

    Eigenvalues up to `noise_floor` belong to the kernel; the derivative is that on the support.
    """
    return _mapped(hermitian(matrix), noise_floor(matrix), _log)


def exp_minus_i(matrix: Tensor) -> Tensor:
    """exp(-i matrix) of a Hermitian `matrix` (..., n, n): complex128, unitary to rounding whatever its norm."""
    return _mapped(hermitian(matrix).to(torch.complex128), noise_floor(matrix), _exp_minus_i)


def lyapunov(matrix: Tensor, right: Tensor) -> Tensor:
    """X with matrix X + X matrix = right, for positive semidefinite `matrix` and Hermitian `right` (..., n, n).

    Where two eigenvalues add up to no more than `noise_floor` the equation has no solution or many: X is 0 there.
    """
    a, b = hermitian(matrix), hermitian(right)
    dtype = torch.promote_types(a.dtype, b.dtype)
    b = b.to(dtype).expand(torch.broadcast_shapes(a.shape, b.shape))
    return _Lyapunov.apply(a.to(dtype), b, noise_floor(matrix))  # type: ignore[no-untyped-call]


def _mapped(matrix: Tensor, floor: Tensor, function: Callable[[Tensor, Tensor], _Pair]) -> Tensor:
    return _HermitianFunction.apply(matrix, floor, function)[0]  # type: ignore[no-untyped-call]


def _sqrt(values: Tensor, floor: Tensor) -> _Pair:
    root = torch.where(values > floor[..., None], values, 0.0).sqrt()
    total = root[..., :, None] + root[..., None, :]
    return root, torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)


def _log(values: Tensor, floor: Tensor) -> _Pair:
    inside = values > floor[..., None]
    values = torch.where(inside, values, 1.0)
    a, b = values[..., :, None], values[..., None, :]
    # (ln a - ln b) / (a - b) = (2 / (a + b)) atanh(t) / t with t = (a - b) / (a + b): no cancellation near a = b.
    t = (a - b) / (a + b)
    near = t.abs() < 0.5
    small = torch.where(near, t, 0.0)
    ratio = torch.where(small.abs() > 1e-4, torch.atanh(small) / torch.where(small == 0, 1.0, small), 1 + small**2 / 3)
    far = (a.log() - b.log()) / torch.where(near, 1.0, a - b)
    divided = torch.where(near, 2 / (a + b) * ratio, far)
    return values.log(), torch.where(inside[..., :, None] & inside[..., None, :], divided, 0.0)


def _exp_minus_i(values: Tensor, _floor: Tensor) -> _Pair:
    half = values / 2
    mean, gap = half[..., :, None] + half[..., None, :], half[..., :, None] - half[..., None, :]
    # torch.sinc(x) is sin(pi x) / (pi x).
    return torch.exp(-1j * values), -1j * torch.exp(-1j * mean) * torch.sinc(gap / torch.pi)


class _HermitianFunction(torch.autograd.Function):
    """f(matrix), and what its derivatives need: eigenvectors and divided differences."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, floor: Tensor, function: Callable[[Tensor, Tensor], _Pair]
    ) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        mapped, divided = function(values, floor)
        return (vectors * mapped[..., None, :]) @ vectors.mH, vectors, divided

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Any], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, vectors, divided = output
        ctx.mark_non_differentiable(vectors, divided)
        ctx.save_for_backward(inputs[0], vectors, divided)
        ctx.save_for_forward(inputs[0], vectors, divided)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_unused: Any) -> tuple[Tensor, None, None]:
        matrix, vectors, divided = ctx.saved_tensors
        return _Derivative.apply(matrix, gradient, vectors, divided.conj()), None, None  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_unused: Any) -> tuple[Tensor, None, None]:
        matrix, vectors, divided = ctx.saved_tensors
        return _Derivative.apply(matrix, tangent, vectors, divided), None, None  # type: ignore[no-untyped-call]


class _Derivative(torch.autograd.Function):
    """The derivative of f at `matrix` along `direction`; it takes `matrix` only to refuse being differentiated.

    Eigenvectors are constants in it, so its own derivative would be wrong in silence.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, direction: Tensor, vectors: Tensor, divided: Tensor) -> Tensor:
        return vectors @ ((vectors.mH @ direction @ vectors) * divided) @ vectors.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_unused: Any) -> tuple[None, None, None, None]:
        raise NotImplementedError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *_unused: Any) -> Tensor:
        raise NotImplementedError(_ONCE)


class _Lyapunov(torch.autograd.Function):
    """Solution of matrix X + X matrix = right; its backward solves the same equation, so it can be repeated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, right: Tensor, floor: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        total = values[..., :, None] + values[..., None, :]
        solvable = total > floor[..., None, None]
        inner = torch.where(solvable, vectors.mH @ right @ vectors / torch.where(solvable, total, 1.0), 0.0)
        return vectors @ inner @ vectors.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        matrix, _, floor = inputs
        ctx.save_for_backward(matrix, floor, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        matrix, floor, solution = ctx.saved_tensors
        adjoint = _Lyapunov.apply(matrix, gradient, floor)  # type: ignore[no-untyped-call]
        return -(adjoint @ solution.mH + solution.mH @ adjoint).sum_to_size(matrix.shape), adjoint, None
