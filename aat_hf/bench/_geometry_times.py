"""The times of `aat bench geometry --times`: maps on many pairs beside other libraries, operations on single states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from aat_hf.bench._geometry_libraries import Functions, Library
from aat_hf.bench._timing import Timing, interleaved
from aat_hf.data.progress import progress
from aat_hf.geometry import Lorentz
from aat_hf.quantum import entropy, evolution, fidelity, measurement, states

MAPS = ("ball dist", "ball exp", "ball log", "lorentz dist", "lorentz exp", "lorentz log")
_BY_VECTORS = "vectors"
_BY_GRAM = "Gram matrices of 16 states"
_BY_PRODUCTS = "matrix products"
_BY_LEVELS = "eigenvalues or singular values"


def pair_times(
    found: Mapping[str, Library], pairs: int, dims: list[int], rounds: int
) -> dict[tuple[str, int], dict[str, Timing]]:
    """Times of each map on `pairs` float32 pairs by (map, dim) and library, and of "dist and gradient".

    geomstats is left out: its NumPy backend is another thing than tensors.
    """
    timings = {}
    with progress("times", len(dims) * 2 * len(MAPS)) as update:
        for dim in dims:
            for key in MAPS:
                x, y = _inputs(key, pairs, dim)
                known = {name: library.functions for name, library in found.items() if name != "geomstats"}
                calls = {name: partial(f[key], x, y) for name, f in known.items() if key in f}
                timings[key, dim] = interleaved(calls, rounds)
                if key.endswith("dist"):
                    slopes = {name: partial(_with_gradient, f, key, x, y) for name, f in known.items() if key in f}
                    timings[f"{key} and gradient", dim] = interleaved(slopes, rounds)
                update(len(timings))
    return timings


def _inputs(key: str, pairs: int, dim: int) -> tuple[Tensor, Tensor]:
    """Points of norm about 1/2 and, for exp, tangent vectors."""
    x, y = torch.randn(2, pairs, dim) * 0.5 / dim**0.5
    if key.startswith("ball"):
        return x, y
    x, y = (Lorentz().projx(torch.cat([u[:, :1], u], -1)) for u in (x, y))
    return (x, Lorentz().proju(x, y)) if key == "lorentz exp" else (x, y)


def _with_gradient(functions: Functions, key: str, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_(True)
    return torch.autograd.grad(functions[key](leaf, y).sum(), leaf)[0]


def state_times(size: int, rounds: int) -> dict[tuple[str, str], Timing]:
    """Times of operations on single complex64 states of `size` amplitudes, by (operation, what it needs)."""
    timings = {}
    kinds = {
        _BY_VECTORS: _on_vectors(size),
        _BY_GRAM: _on_mixtures(size),
        _BY_PRODUCTS: _on_matrices(size),
        _BY_LEVELS: _with_levels(size),
    }
    for kind, calls in kinds.items():
        found = interleaved(calls, rounds if kind == _BY_LEVELS else 20 * rounds)
        timings.update({(name, kind): timing for name, timing in found.items()})
    return timings


def _on_vectors(size: int) -> dict[str, Callable[[], Any]]:
    a, b = normalize(torch.randn(2, size, dtype=torch.complex64), dim=-1)
    row, unitary = a.abs().square(), torch.linalg.qr(torch.randn(size, size, dtype=torch.complex64)).Q
    kept = torch.arange(size) % 128 < 64
    return {
        "fidelity": lambda: fidelity.fidelity(a, b),
        "infidelity": lambda: fidelity.infidelity(a, b),
        "Fubini-Study angle": lambda: fidelity.fubini_study(a, b),
        "Bures distance": lambda: fidelity.bures_distance(a, b),
        "state of an attention row": lambda: states.from_probabilities(row),
        "Born probabilities of tiles of 64": lambda: measurement.tile_probabilities(a, 64),
        "projection on tiles": lambda: measurement.project_tiles(a, kept),
        "sampling 1000 outcomes": lambda: measurement.sample(row, 1000),
        "expectation of an operator": lambda: measurement.expectation(a, unitary),
        "evolution by a given unitary": lambda: evolution.evolve(a, unitary),
        "reduced state of half the system": lambda: states.reduced_state(a, *_halves(size)),
        "entanglement entropy of the halves": lambda: entropy.von_neumann(states.reduced_state(a, *_halves(size))),
    }


def _on_mixtures(size: int) -> dict[str, Callable[[], Any]]:
    a, b = normalize(torch.randn(2, 16, size, dtype=torch.complex64), dim=-1)
    return {
        "entropy of a mixture": lambda: entropy.ensemble_entropy(a),
        "purity of a mixture": lambda: entropy.purity(states.gram_matrix(a)),
        "infidelity of mixtures": lambda: fidelity.ensemble_infidelity(a, b),
        "Bures angle of mixtures": lambda: fidelity.ensemble_bures_angle(a, b),
    }


def _on_matrices(size: int) -> dict[str, Callable[[], Any]]:
    rho, unitary = _density(size), torch.linalg.qr(torch.randn(size, size, dtype=torch.complex64)).Q
    return {
        "partial trace": lambda: states.partial_trace(rho, *_halves(size)),
        "purity": lambda: entropy.purity(rho),
        "pinching by tiles of 64": lambda: measurement.pinch_tiles(rho, 64),
        "expectation in a mixed state": lambda: measurement.mixed_expectation(rho, unitary),
        "evolution of a density matrix": lambda: evolution.evolve_density(rho, unitary),
    }


def _with_levels(size: int) -> dict[str, Callable[[], Any]]:
    rho, sigma = _density(size), _density(size)
    return {
        "von Neumann entropy": lambda: entropy.von_neumann(rho),
        "trace distance": lambda: fidelity.trace_distance(rho, sigma),
        "relative entropy": lambda: entropy.relative_entropy(rho, sigma),
        "propagator of a Hamiltonian": lambda: evolution.propagator(rho),
        "mixed fidelity": lambda: fidelity.mixed_fidelity(rho, sigma),
        "mixed Bures distance": lambda: fidelity.mixed_bures_distance(rho, sigma),
    }


def _density(size: int) -> Tensor:
    return states.density_matrix(normalize(torch.randn(size, size, dtype=torch.complex64), dim=-1))


def _halves(size: int) -> tuple[tuple[int, int], tuple[int]]:
    """Dimensions of two subsystems, as near to each other as factors of the size are, and which one is kept."""
    small = max(factor for factor in range(1, int(size**0.5) + 1) if size % factor == 0)
    return (small, size // small), (0,)
