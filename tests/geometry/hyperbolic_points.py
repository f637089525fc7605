"""Points of the hyperbolic models at given radii."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aat_hf.geometry import Lorentz, PoincareBall

MODELS = [PoincareBall, Lorentz]


def directions(count: int, n: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(count, n, dtype=torch.float64), dim=-1)


def point(model, direction: Tensor, radius, dtype=torch.float64) -> Tensor:
    """The point at this radius from the origin."""
    radius = torch.as_tensor(radius, dtype=torch.float64)[..., None] * math.sqrt(model.c)
    if isinstance(model, PoincareBall):
        return (direction * (radius / 2).tanh() / math.sqrt(model.c)).to(dtype)
    u = direction * radius.sinh() / math.sqrt(model.c)
    return model.projx(torch.cat([u[..., :1], u], -1)).to(dtype)
