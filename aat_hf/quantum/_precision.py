"""Working precision: results are formed in float64 / complex128 and returned in the precision of the input.

A user of attention may pass the rows of a float32, bfloat16 or float16 model: a difference of near states then does
not drown in the rounding of the sums, and what comes back has a dtype that fits the rest of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` as float64, or as complex128 when it is complex."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype all `tensors` promote to, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def real_dtype(*tensors: Tensor) -> torch.dtype:
    """The real part of `common_dtype`."""
    return common_dtype(*tensors).to_real()


def input_epsilon(x: Tensor) -> float:
    """Unit of rounding of the entries of `x`; that of float32 for integers."""
    return torch.finfo(x.dtype if x.is_floating_point() or x.is_complex() else torch.float32).eps


def components(x: Tensor) -> Tensor:
    """Real components of `x` (..., n): (..., n), or (..., 2 n) when it is complex."""
    return torch.view_as_real(x.resolve_conj()).flatten(-2) if x.is_complex() else x
