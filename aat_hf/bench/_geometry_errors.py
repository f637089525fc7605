"""What `aat bench geometry` measures errors on: distances, maps there and back, states; float32 and complex64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aat_hf.bench import _geometry_exact as exact
from aat_hf.bench._geometry_libraries import Functions
from aat_hf.geometry import Lorentz, PoincareBall
from aat_hf.quantum.states import projector

_SPACES: dict[str, tuple[PoincareBall | Lorentz, Callable[..., Any]]] = {
    "ball": (PoincareBall(), exact.ball_distance),
    "lorentz": (Lorentz(), exact.lorentz_distance),
}
_LEVELS = 4  # of density matrices: 60-digit eigenvalues take their time
_MATRICES = 50  # pairs of them at most


class Case(NamedTuple):
    """One measurement: its label, the function a library must have, and the error of what it gives."""

    label: str
    needs: str
    error: Callable[[Functions], float]


def cases(count: int) -> list[Case]:
    """All measurements, on `count` pairs each."""
    few = min(count, _MATRICES)
    return [*_distances(count), *_round_trips(count), *_fisher(count), *_pure(count), *_mixed(few), *_entropies(few)]


def _against(label: str, key: str, function: Callable[..., Any], *inputs: Tensor) -> Case:
    """Largest relative error of `key` on inputs, against 60 digits on the same numbers."""
    truth = exact.exact(function, *inputs)
    return Case(label, key, lambda functions: _relative(functions[key](*inputs), truth))


def _relative(found: Tensor, truth: Tensor) -> float:
    return float(((found.detach().reshape(-1).double() - truth).abs() / truth).max())


def _points(model: PoincareBall | Lorentz, radius: float, count: int) -> Tensor:
    """Points at this radius in random directions of three dimensions, float64."""
    u = normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)
    if isinstance(model, PoincareBall):
        return u * math.tanh(radius / 2)
    return model.projx(torch.cat([u[:, :1], u * math.sinh(radius)], -1))


def _moved(model: PoincareBall | Lorentz, x: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """A random tangent vector of this length, and where it leads."""
    v = model.proju(x, torch.randn_like(x))
    v = v * (length / model.inner(x, v, keepdim=True).sqrt())
    return v, model.expmap(x, v)


def _distances(count: int) -> list[Case]:
    found: list[Case] = []
    for name, (model, truth) in _SPACES.items():
        key = f"{name} dist"
        for radius in (0.1, 1.0, 5.0, 10.0, 15.0):
            x, y = (_points(model, radius, count).float() for _ in range(2))
            found.append(_against(f"{name} distance, radius {radius:g}", key, truth, x, y))
        for radius in (0.0, 1.0, 3.0, 5.0):
            wide = _points(model, radius, count)
            x, y = wide.float(), _moved(model, wide, 1e-3)[1].float()
            found.append(_against(f"{name} distance 1e-3, radius {radius:g}", key, truth, x, y))
        x = _points(model, 3.0, count).float()
        found.append(Case(f"{name} largest d(x, x), radius 3", key, partial(_largest_self_distance, key, x)))
    return found


def _largest_self_distance(key: str, x: Tensor, functions: Functions) -> float:
    return float(functions[key](x, x).abs().max())


def _round_trips(count: int) -> list[Case]:
    found: list[Case] = []
    for name, (model, _) in _SPACES.items():
        for radius, length in ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0)):
            x = _points(model, radius, count).float()
            v = _moved(model, x.double(), length)[0].float()
            label = f"{name} log(exp(v)), radius {radius:g}, length {length:g}"
            found.append(Case(label, f"{name} log", partial(_round_trip, name, x, v)))
    return [*found, Case("ball, log's Jacobian at the origin", "ball log", _jacobian_error)]


def _round_trip(name: str, x: Tensor, v: Tensor, functions: Functions) -> float:
    """Largest length of log(exp(v)) - v over that of v, measured in float64."""
    back = functions[f"{name} log"](x, functions[f"{name} exp"](x, v)).double()
    model, wide = _SPACES[name][0], x.double()
    return float((model.inner(wide, back - v) / model.inner(wide, v.double())).sqrt().max())


def _jacobian_error(functions: Functions) -> float:
    """Largest entry of the Jacobian of log_0 at 0, less the identity; NaN where it cannot be had by autograd."""
    try:
        jacobian = torch.autograd.functional.jacobian(
            lambda y: functions["ball log"](torch.zeros(3), y), torch.zeros(3)
        )
    except RuntimeError:  # computed outside autograd
        return math.nan
    return float((jacobian - torch.eye(3)).abs().max())


def _fisher(count: int) -> list[Case]:
    found: list[Case] = []
    for size in (1.0, 1e-1, 1e-2, 1e-3):
        p = torch.softmax(torch.randn(count, 16, dtype=torch.float64), -1)
        r = p * torch.exp(size * torch.randn(count, 16))
        p, r = p.float(), (r / r.sum(-1, keepdim=True)).float()
        label = f"Fisher-Rao distance, perturbation {size:g}"
        found.append(_against(label, "fisher dist", exact.fisher_distance, p, r))
        found.append(Case(f"Fisher-Rao exp(log), perturbation {size:g}", "fisher log", partial(_fisher_trip, p, r)))
    return found


def _fisher_trip(p: Tensor, r: Tensor, functions: Functions) -> float:
    """Largest entry of exp(log(r)) - r over the largest of r - p."""
    back = functions["fisher exp"](p, functions["fisher log"](p, r)).double()
    return float(((back - r).abs().amax(-1) / (r.double() - p).abs().amax(-1)).max())


def _pure(count: int) -> list[Case]:
    a, other = normalize(torch.randn(2, count, 8, dtype=torch.complex128), dim=-1)
    found = [_against("fidelity of pure states", "fidelity", exact.fidelity, *_narrow(a, other))]
    for size in (1e-1, 1e-3, 1e-5):
        near = _narrow(a, normalize(a + size * other, dim=-1))
        found.append(_against(f"1 - fidelity of pure states, {size:g} apart", "infidelity", exact.infidelity, *near))
    turned = a * torch.exp(1j * torch.rand(count, 1, dtype=torch.float64))
    inputs = _narrow(a, turned)
    return [*found, Case("largest fidelity less 1, one ray", "fidelity", lambda f: _above_one(f["fidelity"](*inputs)))]


def _mixed(count: int) -> list[Case]:
    found: list[Case] = []
    for label, smallest in (("mixed", 1.0), ("nearly pure", 1e-3)):
        rho, sigma = (_density(count, smallest) for _ in range(2))
        inputs = _narrow(rho, sigma)
        found.append(_against(f"fidelity of {label} states", "mixed fidelity", exact.mixed_fidelity, *inputs))
        inputs = _narrow(rho, 0.99 * rho + 0.01 * sigma)
        text = f"1 - fidelity of {label} states, a hundredth exchanged"
        found.append(_against(text, "mixed infidelity", exact.mixed_infidelity, *inputs))
    a, b = normalize(torch.randn(2, count, _LEVELS, dtype=torch.complex128), dim=-1)
    truth, inputs = exact.exact(exact.fidelity, a, b), _narrow(projector(a), projector(b))
    text = "fidelity of pure states as matrices"
    found.append(Case(text, "mixed fidelity", lambda functions: _relative(functions["mixed fidelity"](*inputs), truth)))
    same = _narrow(rho, rho)
    text = "largest fidelity less 1, equal nearly pure states"
    return [*found, Case(text, "mixed fidelity", lambda f: _above_one(f["mixed fidelity"](*same)))]


def _above_one(found: Tensor) -> float:
    return float((found.double() - 1).max())


def _entropies(count: int) -> list[Case]:
    found = []
    for label, smallest in (("mixed", 1.0), ("nearly pure", 1e-3), ("almost pure", 1e-5)):
        (rho,) = _narrow(_density(count, smallest))
        found.append(_against(f"entropy of {label} states", "entropy", exact.entropy, rho))
    (pure,) = _narrow(projector(normalize(torch.randn(count, _LEVELS, dtype=torch.complex128), dim=-1)))
    found.append(Case("largest entropy of pure states", "entropy", lambda f: float(f["entropy"](pure).abs().max())))
    return found


def _density(count: int, rest: float) -> Tensor:
    """Density matrices with random vectors; all levels but the first are multiplied by `rest`."""
    levels = torch.rand(count, _LEVELS, dtype=torch.float64) + 0.2
    levels[:, 1:] *= rest
    vectors = torch.linalg.qr(torch.randn(count, _LEVELS, _LEVELS, dtype=torch.complex128)).Q
    return (vectors * (levels / levels.sum(-1, keepdim=True))[:, None]) @ vectors.mH


def _narrow(*tensors: Tensor) -> list[Tensor]:
    """In complex64; Hermitian where they are, as rounding keeps it."""
    return [(t if t.ndim == 2 else (t + t.mH) / 2).to(torch.complex64) for t in tensors]
