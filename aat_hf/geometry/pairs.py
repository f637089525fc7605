"""Distances of large batches on the CPU in one pass over memory, the sums in float64.

What a user of attention gets: hyperbolic scores of a million pairs at the speed of reading them, with and without
gradients, and the accuracy of the formula: it is that of `lorentz.half`, compiled.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from aat_hf.geometry import lorentz
from aat_hf.geometry.poincare import dot

_LEAST = 2**18  # elements; below, compiling and starting threads costs more than it brings
_DTYPES = (torch.float32, torch.float64)


def suits(x: Tensor, y: Tensor) -> bool:
    """Whether `lorentz_half` takes these points and pays."""
    same = x.shape == y.shape and x.dtype == y.dtype and x.dtype in _DTYPES
    return same and x.device.type == "cpu" and x.numel() > _LEAST and not torch.compiler.is_compiling()


def lorentz_half(x: Tensor, y: Tensor, root: float) -> Tensor:
    """`lorentz.half` of points of curvature -root^2, both (..., n + 1) with time first: (..., 1) float64."""
    return _LorentzHalf.apply(x, y, root)  # type: ignore[no-untyped-call]


# "reassoc" lets sums run in vector lanes; the differences of the two points are still taken first.
@njit(nogil=True, boundscheck=False, error_model="numpy", fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _halves(x: NDArray[Any], y: NDArray[Any], root: float, out: NDArray[np.float64]) -> None:
    for i in range(x.shape[0]):  # x, y: [pairs, n + 1]
        uu = vv = es = total = 0.0
        for k in range(1, x.shape[1]):
            u, v = root * x[i, k], root * y[i, k]
            uu += u * u
            vv += v * v
            es += (u - v) * (u + v)
        time_u, time_v = math.sqrt(1 + uu), math.sqrt(1 + vv)
        m = (time_u + time_v) / 2
        along = es / (4 * m)
        for k in range(1, x.shape[1]):
            u, v = root * x[i, k], root * y[i, k]
            numerator = (u - v) * (1 + m) - (u + v) * along
            total += numerator * numerator
        out[i] = total / (4 * (1 + time_u) * (1 + time_v))


@njit(nogil=True, boundscheck=False, error_model="numpy", fastmath={"reassoc"})  # type: ignore[untyped-decorator]
def _slopes(x: NDArray[Any], y: NDArray[Any], root: float, gradient: NDArray[np.float64], out: NDArray[Any]) -> None:
    for i in range(x.shape[0]):  # `_slope` times the gradient, out: [pairs, n + 1]
        uu = vv = es = 0.0
        for k in range(1, x.shape[1]):
            u, v = root * x[i, k], root * y[i, k]
            uu += u * u
            vv += v * v
            es += (u - v) * (u + v)
        time_u, time_v = math.sqrt(1 + uu), math.sqrt(1 + vv)
        along = es / ((time_u + time_v) * time_u)
        factor = gradient[i] * root / 2
        out[i, 0] = 0
        for k in range(1, x.shape[1]):
            u, v = root * x[i, k], root * y[i, k]
            out[i, k] = factor * ((u - v) - u * along)


class _LorentzHalf(torch.autograd.Function):
    """The compiled loop; its derivatives are closed forms."""

    @staticmethod
    def forward(x: Tensor, y: Tensor, root: float) -> Tensor:
        out = torch.empty(x.numel() // x.shape[-1], dtype=torch.float64)
        _in_threads(_halves, root, _rows(x), _rows(y), out)
        return out.reshape(*x.shape[:-1], 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, y, ctx.root = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        sides = zip(ctx.needs_input_grad, (x, y), (y, x), strict=False)
        at_x, at_y = (_pulled(gradient, one, other, ctx.root) if wanted else None for wanted, one, other in sides)
        return at_x, at_y, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, y_tangent: Tensor, _root: None) -> Tensor:
        x, y = ctx.saved_tensors
        at_x, at_y = _slope(x, y, ctx.root), _slope(y, x, ctx.root)
        return dot(at_x, x_tangent[..., 1:]) + dot(at_y, y_tangent[..., 1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, y: Tensor, root: float) -> tuple[Tensor, int]:
        x, y = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((x, y), in_dims, strict=False)
        )
        return lorentz_half(x, y, root), 0


def _pulled(gradient: Tensor, x: Tensor, y: Tensor, root: float) -> Tensor:
    """Gradient in x from that in half: by tensors when it is to be differentiated itself, else compiled."""
    if torch.is_grad_enabled():
        return pad(gradient * _slope(x, y, root), (1, 0)).to(x.dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    _in_threads(_slopes, root, _rows(x), _rows(y), gradient.reshape(-1).contiguous(), out.view(-1, x.shape[-1]))
    return out


def _slope(x: Tensor, y: Tensor, root: float) -> Tensor:
    """Derivative of half in the spatial part of x: float64.

    2 h = time(u) time(v) - u.v - 1 has the derivative (u - v) - u (time(u) - time(v)) / time(u) in u, 0 at u = v.
    """
    u, v = (root * t[..., 1:].double() for t in (x, y))
    time_u, time_v = lorentz.time(u), lorentz.time(v)
    rise = dot(u - v, u + v) / (time_u + time_v)
    return ((u - v) - u * (rise / time_u)) * (root / 2)


def _rows(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).contiguous()


def _in_threads(loop: Any, root: float, x: Tensor, y: Tensor, *others: Tensor) -> None:
    """Run a loop over rows on torch's number of threads."""
    threads = torch.get_num_threads()
    parts = zip(*(np.array_split(t.numpy(), threads) for t in (x, y, *others)), strict=True)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: loop(part[0], part[1], root, *part[2:]), parts))
