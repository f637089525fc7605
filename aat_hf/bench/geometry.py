"""`aat bench geometry`: errors of distances and maps in float32 against 60-digit arithmetic, and their speed.

Side by side with geoopt, geomstats and hypll where they are installed, on the very same float32 numbers.
"""

from __future__ import annotations

import argparse
import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aat_hf.bench._common import environment, markdown_table, write_csv
from aat_hf.bench._timing import interleaved
from aat_hf.data.progress import notice, progress
from aat_hf.geometry import Lorentz, PoincareBall, fisher

Row = list[Any]
Functions = dict[str, Callable[..., Any]]
Case = tuple[str, str, Callable[[Functions], float]]


@dataclass(frozen=True)
class GeometryResult:
    """One measurement of one library; `value` is a relative error, or milliseconds."""

    measurement: str
    library: str
    version: str
    value: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench geometry", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="pairs of each accuracy measurement")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of each time; 0 leaves times out")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a CSV with one line per measurement and library to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    libraries = _libraries()
    results = errors(libraries, args.count)
    if args.pairs:
        results += times(libraries, args.pairs, args.dim, args.rounds)
    print(f"{args.count} pairs (errors), {args.pairs} pairs of dimension {args.dim} (times); {environment()}\n")
    print(summary(results))
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    return 0


def _libraries() -> dict[str, tuple[str, Functions]]:
    """Version and functions of each library that can be imported, ours first."""
    import aat_hf

    ball, hyperboloid = PoincareBall(), Lorentz()
    ours: Functions = {
        "ball dist": ball.dist, "ball exp": ball.expmap, "ball log": ball.logmap,
        "lorentz dist": hyperboloid.dist, "lorentz exp": hyperboloid.expmap, "lorentz log": hyperboloid.logmap,
        "fisher": fisher.distance,
    }  # fmt: skip
    found = {"aat_hf": (aat_hf.__version__, ours)}
    for name, functions in {"geoopt": _geoopt, "geomstats": _geomstats, "hypll": _hypll}.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = (_version(name), functions())
        except Exception as error:  # a library that is not there, or does not import beside this numpy
            notice(f"without {name}: {error}")
    found["textbook"] = ("", {"ball dist": _textbook_ball, "lorentz dist": _textbook_lorentz, "fisher": _arccos})
    return found


def _version(name: str) -> str:
    return importlib.import_module("importlib.metadata").version(name)


def _geoopt() -> Functions:
    geoopt = importlib.import_module("geoopt")
    ball, hyperboloid = geoopt.PoincareBall(c=1.0), geoopt.Lorentz(k=1.0)
    return {
        "ball dist": ball.dist, "ball exp": ball.expmap, "ball log": ball.logmap,
        "lorentz dist": hyperboloid.dist, "lorentz exp": hyperboloid.expmap, "lorentz log": hyperboloid.logmap,
    }  # fmt: skip


def _geomstats() -> Functions:
    numpy_functions = importlib.import_module("geomstats.geometry.poincare_ball").PoincareBall(dim=3).metric
    information = importlib.import_module("geomstats.information_geometry.categorical")

    def fisher_rao(p: Tensor, r: Tensor) -> Tensor:
        metric = information.CategoricalDistributions(dim=p.shape[-1] - 1).metric
        return torch.as_tensor(metric.dist(p.numpy(), r.numpy()))

    return {
        "ball dist": lambda x, y: torch.as_tensor(numpy_functions.dist(x.numpy(), y.numpy())),
        "ball exp": lambda x, v: torch.as_tensor(numpy_functions.exp(v.numpy(), x.numpy())),
        "ball log": lambda x, y: torch.as_tensor(numpy_functions.log(y.numpy(), x.numpy())),
        "fisher": fisher_rao,
    }


def _hypll() -> Functions:
    module = importlib.import_module("hypll.manifolds.poincare_ball.math.diffgeom")
    c = torch.ones(())
    return {
        "ball dist": lambda x, y: module.dist(x, y, c),
        "ball exp": lambda x, v: module.expmap(x, v, c),
        "ball log": lambda x, y: module.logmap(x, y, c),
    }


def _textbook_ball(x: Tensor, y: Tensor) -> Tensor:
    gaps = (1 - x.square().sum(-1)) * (1 - y.square().sum(-1))
    return (1 + 2 * (x - y).square().sum(-1) / gaps).arccosh()


def _textbook_lorentz(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1)).arccosh()


def _arccos(p: Tensor, r: Tensor) -> Tensor:
    return 2 * (p * r).sqrt().sum(-1).arccos()


def _exact(function: Callable[[Any, Row, Row], Any], *tensors: Tensor) -> Tensor:
    """`function` with 60 digits on the rows of tensors (N, n): (N,) float64."""
    mpmath = importlib.import_module("mpmath")
    with mpmath.workdps(60):
        rows = [[[mpmath.mpf(float(value)) for value in row] for row in t.tolist()] for t in tensors]
        values = [float(function(mpmath.mp, x, y)) for x, y in zip(*rows, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


def _exact_ball(mp: Any, x: Row, y: Row) -> Any:
    gaps = (1 - mp.fsum(a * a for a in x)) * (1 - mp.fsum(b * b for b in y))
    return mp.acosh(1 + 2 * mp.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / gaps)


def _exact_lorentz(mp: Any, x: Row, y: Row) -> Any:
    """Of the spatial parts: float32 time coordinates do not lie on the hyperboloid."""
    times = mp.sqrt(1 + mp.fsum(a * a for a in x[1:])) * mp.sqrt(1 + mp.fsum(b * b for b in y[1:]))
    return mp.acosh(times - mp.fsum(a * b for a, b in zip(x[1:], y[1:], strict=True)))


def _exact_fisher(mp: Any, p: Row, r: Row) -> Any:
    affinity = mp.fsum(mp.sqrt(a * b) for a, b in zip(p, r, strict=True))
    return 2 * mp.acos(affinity / mp.sqrt(mp.fsum(p) * mp.fsum(r)))


def _points(model: PoincareBall | Lorentz, radius: float, count: int) -> Tensor:
    """Points at this radius in random directions of three dimensions, float64."""
    u = torch.nn.functional.normalize(torch.randn(count, 3, dtype=torch.float64), dim=-1)
    if isinstance(model, PoincareBall):
        return u * math.tanh(radius / 2)
    return model.projx(torch.cat([u[:, :1], u * math.sinh(radius)], -1))


def _moved(model: PoincareBall | Lorentz, x: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """A random tangent vector of this length, and where it leads."""
    v = model.proju(x, torch.randn_like(x))
    v = v * (length / model.inner(x, v, keepdim=True).sqrt())
    return v, model.expmap(x, v)


def errors(libraries: dict[str, tuple[str, Functions]], count: int) -> list[GeometryResult]:
    """Largest relative errors, float32."""
    cases = [*_distances(count), *_round_trips(count), *_fisher(count)]
    results = []
    with progress("errors", len(cases)) as update:
        for number, (measurement, name, error) in enumerate(cases):
            for library, (version, functions) in libraries.items():
                if name in functions:
                    results.append(GeometryResult(measurement, library, version, error(functions)))
            update(number + 1)
    return results


def _relative(found: Tensor, exact: Tensor) -> float:
    return float(((found.detach().reshape(-1).double() - exact).abs() / exact).max())


def _distances(count: int) -> list[Case]:
    cases: list[Case] = []
    for name, model, exact in (("ball", PoincareBall(), _exact_ball), ("lorentz", Lorentz(), _exact_lorentz)):
        key = f"{name} dist"
        for radius in (0.1, 1.0, 5.0, 10.0, 15.0):
            x, y = (_points(model, radius, count).float() for _ in range(2))
            cases.append(_distance_case(f"{name} distance, radius {radius:g}", key, x, y, _exact(exact, x, y)))
        for radius in (0.0, 1.0, 3.0, 5.0):
            x = _points(model, radius, count)
            x, y = x.float(), _moved(model, x, 1e-3)[1].float()
            cases.append(_distance_case(f"{name} distance 1e-3, radius {radius:g}", key, x, y, _exact(exact, x, y)))
        x = _points(model, 3.0, count).float()
        cases.append((f"{name} largest d(x, x), radius 3", key, partial(_largest_self_distance, key, x)))
    return cases


def _largest_self_distance(key: str, x: Tensor, functions: Functions) -> float:
    return float(functions[key](x, x).abs().max())


def _distance_case(label: str, key: str, x: Tensor, y: Tensor, exact: Tensor) -> Case:
    return label, key, lambda functions: _relative(functions[key](x, y), exact)


def _round_trips(count: int) -> list[Case]:
    cases: list[Case] = []
    for name, model in (("ball", PoincareBall()), ("lorentz", Lorentz())):
        for radius, length in ((1.0, 1.0), (2.0, 2.0), (4.0, 4.0)):
            x = _points(model, radius, count).float()
            v = _moved(model, x.double(), length)[0].float()

            def error(f: Functions, x: Tensor = x, v: Tensor = v, model: Any = model, name: str = name) -> float:
                back = f[f"{name} log"](x, f[f"{name} exp"](x, v)).double()
                wide = x.double()
                return float((model.inner(wide, back - v) / model.inner(wide, v.double())).sqrt().max())

            cases.append((f"{name} log(exp(v)), radius {radius:g}, length {length:g}", f"{name} log", error))
    return [*cases, ("ball, log's Jacobian at the origin", "ball log", _jacobian_error)]


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
    cases: list[Case] = []
    for size in (1.0, 1e-1, 1e-2, 1e-3):
        p = torch.softmax(torch.randn(count, 16, dtype=torch.float64), -1)
        r = p * torch.exp(size * torch.randn(count, 16))
        p, r = p.float(), (r / r.sum(-1, keepdim=True)).float()
        exact = _exact(_exact_fisher, p, r)
        cases.append(_distance_case(f"Fisher-Rao distance, perturbation {size:g}", "fisher", p, r, exact))
    return cases


def times(libraries: dict[str, tuple[str, Functions]], pairs: int, dim: int, rounds: int) -> list[GeometryResult]:
    """Median milliseconds of a call on `pairs` pairs, float32."""
    u = torch.randn(2, pairs, dim) * 0.5 / dim**0.5
    points = {"ball": u, "lorentz": Lorentz().projx(torch.cat([u[..., :1], u], -1)), "fisher": u.softmax(-1)}
    results = []
    for key in ("ball dist", "ball log", "ball exp", "lorentz dist", "lorentz log", "fisher"):
        x, y = points[key.split()[0]]
        known = {name: partial(f[key], x, y) for name, (_, f) in libraries.items() if key in f}
        known.pop("geomstats", None)  # on its NumPy backend: another thing than tensors
        timings = interleaved(known, rounds)
        for name, timing in timings.items():
            label = f"ms, {key}, {pairs} pairs"
            results.append(GeometryResult(label, name, libraries[name][0], 1e3 * timing.median))
    return results


def summary(results: Sequence[GeometryResult]) -> str:
    """One line per measurement, one column per library."""
    names = list(dict.fromkeys(result.library for result in results))
    versions = {result.library: result.version for result in results}
    table: dict[str, dict[str, float]] = {}
    for result in results:
        table.setdefault(result.measurement, {})[result.library] = result.value
    rows = [[label, *(_cell(label, row.get(name)) for name in names)] for label, row in table.items()]
    return markdown_table(["largest relative error, float32", *(f"{n} {versions[n]}".strip() for n in names)], rows)


def _cell(label: str, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if label.startswith("ms") else f"{value:.1e}"
