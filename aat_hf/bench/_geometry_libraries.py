"""The functions of each library that `aat bench geometry` sets side by side, under common names.

Points, tangent vectors and states are tensors of shape (N, n), density matrices (N, n, n); ours come first. The
textbook's formulae are those as printed, in the precision of the input.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from aat_hf.data.progress import notice
from aat_hf.geometry import Lorentz, PoincareBall, fisher
from aat_hf.quantum import entropy, fidelity

Functions = dict[str, Callable[..., Any]]


class Library(NamedTuple):
    """One library: its version and its functions by our names."""

    version: str
    functions: Functions


def libraries() -> dict[str, Library]:
    """Each library that can be imported, ours first, and the textbook."""
    import aat_hf

    found = {"aat_hf": Library(aat_hf.__version__, _ours())}
    for name, functions in {"geoopt": _geoopt, "geomstats": _geomstats, "hypll": _hypll, "qutip": _qutip}.items():
        try:
            with tolerant_imports():
                found[name] = Library(importlib.metadata.version(name), functions())
        except ImportError as error:
            notice(f"without {name}: {error}")
    return {**found, "textbook": Library("", _textbook())}


@contextmanager
def tolerant_imports() -> Iterator[None]:
    """Hide warnings, and lend NumPy 2.4 the name `trapz` of its `trapezoid`, which geomstats 2.8 still imports."""
    lent = not hasattr(numpy, "trapz")
    if lent:
        vars(numpy)["trapz"] = numpy.trapezoid
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if lent:
            del vars(numpy)["trapz"]


def _ours() -> Functions:
    return {
        **_maps(PoincareBall(), Lorentz()),
        "fisher dist": fisher.distance, "fisher exp": fisher.expmap, "fisher log": fisher.logmap,
        "fidelity": fidelity.fidelity, "infidelity": fidelity.infidelity,
        "mixed fidelity": fidelity.mixed_fidelity, "mixed infidelity": fidelity.mixed_infidelity,
        "entropy": entropy.von_neumann,
    }  # fmt: skip


def _maps(ball: Any, hyperboloid: Any) -> Functions:
    return {
        "ball dist": ball.dist, "ball exp": ball.expmap, "ball log": ball.logmap,
        "lorentz dist": hyperboloid.dist, "lorentz exp": hyperboloid.expmap, "lorentz log": hyperboloid.logmap,
    }  # fmt: skip


def _geoopt() -> Functions:
    geoopt = importlib.import_module("geoopt")
    return _maps(geoopt.PoincareBall(c=1.0), geoopt.Lorentz(k=1.0))


def _geomstats() -> Functions:
    spaces = {
        "ball": importlib.import_module("geomstats.geometry.poincare_ball").PoincareBall,
        "lorentz": importlib.import_module("geomstats.geometry.hyperboloid").Hyperboloid,
        "fisher": importlib.import_module("geomstats.information_geometry.categorical").CategoricalDistributions,
    }

    def call(space: str, method: str, swapped: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        def function(x: Tensor, y: Tensor) -> Tensor:
            metric = spaces[space](dim=x.shape[-1] - (space != "ball")).metric
            first, second = (y, x) if swapped else (x, y)
            return torch.as_tensor(getattr(metric, method)(first.numpy(), second.numpy()))

        return function

    methods = (("dist", False), ("exp", True), ("log", True))  # exp(v, x), log(y, x)
    return {f"{space} {method}": call(space, method, swapped) for space in spaces for method, swapped in methods}


def _hypll() -> Functions:
    module = importlib.import_module("hypll.manifolds.poincare_ball.math.diffgeom")
    c = torch.ones(())
    return {
        "ball dist": lambda x, y: module.dist(x, y, c),
        "ball exp": lambda x, v: module.expmap(x, v, c),
        "ball log": lambda x, y: module.logmap(x, y, c),
    }


def _qutip() -> Functions:
    qutip = importlib.import_module("qutip")

    def each(function: Callable[..., float]) -> Callable[..., Tensor]:
        def of_rows(*tensors: Tensor) -> Tensor:
            return torch.tensor([function(*(qutip.Qobj(x.numpy()) for x in row)) for row in zip(*tensors, strict=True)])

        return of_rows

    def fidelities(a: Any, b: Any) -> float:
        return float(qutip.fidelity(a, b)) ** 2

    def infidelities(a: Any, b: Any) -> float:
        return 1 - fidelities(a, b)

    return {
        "fidelity": each(fidelities), "infidelity": each(infidelities),
        "mixed fidelity": each(fidelities), "mixed infidelity": each(infidelities),
        "entropy": each(lambda rho: float(qutip.entropy_vn(rho))),
    }  # fmt: skip


def _textbook() -> Functions:
    return {
        "ball dist": _textbook_ball,
        "lorentz dist": _textbook_lorentz,
        "fisher dist": lambda p, r: 2 * (p * r).sqrt().sum(-1).arccos(),
        "fidelity": _textbook_fidelity,
        "infidelity": lambda a, b: 1 - _textbook_fidelity(a, b),
        "mixed fidelity": _textbook_mixed,
        "mixed infidelity": lambda rho, sigma: 1 - _textbook_mixed(rho, sigma),
        "entropy": _textbook_entropy,
    }


def _textbook_ball(x: Tensor, y: Tensor) -> Tensor:
    gaps = (1 - x.square().sum(-1)) * (1 - y.square().sum(-1))
    return (1 + 2 * (x - y).square().sum(-1) / gaps).arccosh()


def _textbook_lorentz(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1)).arccosh()


def _textbook_fidelity(a: Tensor, b: Tensor) -> Tensor:
    return (a.conj() * b).sum(-1).abs().square()


def _textbook_mixed(rho: Tensor, sigma: Tensor) -> Tensor:
    """(tr sqrt(sqrt(rho) sigma sqrt(rho)))^2."""
    levels, vectors = torch.linalg.eigh(rho)
    root = (vectors * levels.clamp(min=0).sqrt()[..., None, :]) @ vectors.mH
    return torch.linalg.eigvalsh(root @ sigma @ root).clamp(min=0).sqrt().sum(-1).square()


def _textbook_entropy(rho: Tensor) -> Tensor:
    levels = torch.linalg.eigvalsh(rho).clamp(min=0)
    return -torch.special.xlogy(levels, levels).sum(-1)
