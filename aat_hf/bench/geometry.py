"""`aat bench geometry`: errors of distances, maps and states against 60-digit arithmetic, and with --times their speed.

With --log-mass, the log-mass of tiles of Gaussian scores beside its prediction, which is that of infinitely many keys.

Side by side with geoopt, geomstats, hypll and QuTiP where they are installed, on the very same numbers:
pip install mpmath geoopt hypll qutip geomstats.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import aat_hf
from aat_hf.bench._common import environment, markdown_table, write_csv
from aat_hf.bench._geometry_errors import cases
from aat_hf.bench._geometry_libraries import Library, libraries
from aat_hf.bench._geometry_times import pair_times, state_times
from aat_hf.bench._timing import Timing
from aat_hf.data.progress import notice, progress
from aat_hf.geometry.free_energy import gaussian_log_mass
from aat_hf.tiling.moments import cumulant

LOG_MASS_KEYS = (8, 16, 32, 64)
LOG_MASS_SPREADS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)


@dataclass(frozen=True)
class GeometryResult:
    """One measurement of one library; `value` is a relative error unless `unit` says "s" or "nats"."""

    measurement: str
    library: str
    version: str
    value: float
    unit: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0."""
    parser = argparse.ArgumentParser(prog="aat bench geometry", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="pairs of each accuracy measurement")
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--times", action="store_true", help="measure times instead of errors")
    table.add_argument("--log-mass", action="store_true", help="tabulate the log-mass of tiles instead of errors")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of each time")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], help="dimensions of these points")
    parser.add_argument("--size", type=int, default=512, help="amplitudes of the states that are timed")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a CSV with one line per measurement and library to this file")
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    print(f"{environment()}\n")
    results = _times(args) if args.times else _log_masses() if args.log_mass else _errors(args.count)
    if args.out is not None:
        write_csv(args.out, results)
        notice(f"Wrote {args.out}")
    return 0


def _errors(count: int) -> list[GeometryResult]:
    if importlib.util.find_spec("mpmath") is None:
        raise ImportError("60-digit arithmetic needs mpmath: pip install mpmath")
    found = libraries()
    results = errors(found, count)
    print(error_table(results))
    return results


def errors(found: Mapping[str, Library], count: int) -> list[GeometryResult]:
    """Largest errors in float32 and complex64, of every library that has the function."""
    with progress("60-digit arithmetic", 0):
        measurements = cases(count)
    results = []
    with progress("errors", len(measurements)) as update:
        for number, case in enumerate(measurements):
            for name, (version, functions) in found.items():
                if case.needs in functions:
                    results.append(GeometryResult(case.label, name, version, case.error(functions)))
            update(number + 1)
    return results


def error_table(results: Sequence[GeometryResult]) -> str:
    """One line per measurement, one column per library."""
    versions = {result.library: result.version for result in results}
    versions |= {"textbook": versions.pop("textbook", "")}  # the last column
    table: dict[str, dict[str, float]] = {}
    for result in results:
        table.setdefault(result.measurement, {})[result.library] = result.value
    rows = [[label, *(f"{row[name]:.1e}" if name in row else "–" for name in versions)] for label, row in table.items()]
    return markdown_table(["largest relative error", *(f"{n} {v}".strip() for n, v in versions.items())], rows)


def _times(args: argparse.Namespace) -> list[GeometryResult]:
    found = {name: library for name, library in libraries().items() if name != "qutip"}
    pairs = pair_times(found, args.pairs, args.dims, args.rounds)
    print(f"{args.pairs} pairs, float32, median of {args.rounds} interleaved rounds\n\n{_pair_table(pairs)}\n")
    states = state_times(args.size, args.rounds)
    print(f"One state of {args.size} amplitudes, complex64, medians\n\n{_state_table(states)}")
    results = [
        GeometryResult(f"{key}, {dim} dimensions", name, found[name].version, timing.median, "s")
        for (key, dim), timings in pairs.items()
        for name, timing in timings.items()
    ]
    ours = found["aat_hf"].version
    return results + [GeometryResult(name, "aat_hf", ours, t.median, "s") for (name, _), t in states.items()]


def _pair_table(timings: Mapping[tuple[str, int], Mapping[str, Timing]]) -> str:
    names = list(dict.fromkeys(name for row in timings.values() for name in row))
    rows = []
    for (key, dim), row in timings.items():
        cells = [f"{1e3 * row[name].median:.0f}" if name in row else "–" for name in names]
        ratio = f"{row['aat_hf'].median / row['geoopt'].median:.2f}" if "geoopt" in row else "–"
        rows.append([key, str(dim), *cells, ratio])
    return markdown_table(["ms", "dimensions", *names, "aat_hf / geoopt"], rows)


def _state_table(timings: Mapping[tuple[str, str], Timing]) -> str:
    rows = [[name, kind, f"{1e3 * timing.median:.3f}"] for (name, kind), timing in timings.items()]
    return markdown_table(["operation", "works on", "ms"], rows)


def _log_masses() -> list[GeometryResult]:
    results = log_masses()
    title = "Log-mass of n scores of standard deviation s, and what its prediction adds, nats"
    print(f"{title}\n\n{log_mass_table(results)}")
    return results


def log_masses() -> list[GeometryResult]:
    """Log-mass of n Gaussian scores ("aat_hf") and what second-order moments predict ("prediction"), n by n."""
    spread = torch.tensor(LOG_MASS_SPREADS, dtype=torch.float64)
    results = []
    for count in LOG_MASS_KEYS:
        predicted = math.log(count) + cumulant(spread.square(), torch.tensor(count))
        for name, values in (("aat_hf", gaussian_log_mass(spread, count)), ("prediction", predicted)):
            for s, value in zip(LOG_MASS_SPREADS, values.tolist(), strict=True):
                results.append(GeometryResult(_log_mass_label(count, s), name, aat_hf.__version__, value, "nats"))
    return results


def log_mass_table(results: Sequence[GeometryResult]) -> str:
    """One line per spread, one column per number of keys: the log-mass (prediction less log-mass)."""
    value = {(result.measurement, result.library): result.value for result in results}
    rows = []
    for s in LOG_MASS_SPREADS:
        labels = [_log_mass_label(count, s) for count in LOG_MASS_KEYS]
        pairs = [(value[label, "aat_hf"], value[label, "prediction"]) for label in labels]
        # + 0.0: rounding is no "-0.000".
        rows.append([f"{s:g}", *(f"{exact:.3f} ({round(over - exact, 3) + 0.0:+.3f})" for exact, over in pairs)])
    return markdown_table(["s", *(f"n = {count}" for count in LOG_MASS_KEYS)], rows)


def _log_mass_label(count: int, spread: float) -> str:
    return f"log-mass, n = {count}, s = {spread:g}"
