"""Observables of attention: one named function each, cheap ones by default, expensive ones when asked for.

What a user gets: `observables(weights, ["entropy", "effective_rank"])`, the same names in `record(model,
observables=...)` and `QuantumGeometricAttention.get_metrics(...)`, and `describe()`, the table of what there is:

n tokens, T = n / tile tiles, d tiles that a tile is linked to, H heads of a layer; costs are for one head.

- entropy, O(n^2): mean over rows of -sum p ln p, nats.
- fisher_length, O(n^2): mean Fisher-Rao distance of a row and the next, radians in [0, pi].
- fidelity, O(n^2): mean |<psi|psi_kept>|^2 of rows and their kept tiles. Needs the tile map.
- scale_energies, O(n^2 log n): share of the squared norm at each scale 1, 2, 4, ... tokens, then that of the mean.
- forman_curvature, O(n^2 + T^3): mean over the edges of the tile graph.
- effective_rank, O(n^3): e^S of the head's density matrix: how many different rows it has.
- commutator_norm, O(H n^3): mean norm of the commutators with the layer's other heads, in [0, 1 / sqrt 2].
- ollivier_curvature, O(n^2 + T^2 d^3): mean over the edges of the tile graph. Needs SciPy.

The tile graph links tiles of which one keeps the other; without a tile map, those whose mass, averaged both ways, is
above the mean 1 / T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from aat_hf.crystal.scales import coarsen, map_energies
from aat_hf.geometry import fisher, tile_graph
from aat_hf.quantum.entropy import head_entropy
from aat_hf.quantum.fidelity import fidelity
from aat_hf.quantum.operators import noncommutativity
from aat_hf.quantum.states import from_probabilities
from aat_hf.tiling.tile_map import TileMap


@dataclass(frozen=True)
class Heads:
    """What observables see of the heads of a layer.

    Attributes:
        weights: (batch, heads, queries, keys) exact attention, float32 or wider; rows without keys are 0.
        tile_map: the tiles that were kept, if any were chosen.
        tile: tokens of a tile where there is no tile map.
    """

    weights: Tensor
    tile_map: TileMap | None
    tile: int


class Observable(NamedTuple):
    """A named function of heads, its cost, and whether it needs the tile map or square attention.

    function: from `Heads` to (batch, heads) or (batch, heads, ...).
    cost: of one head, in O-notation. expensive: computed only when named.
    """

    function: Callable[[Heads], Tensor]
    cost: str
    expensive: bool = False
    needs_map: bool = False
    needs_square: bool = False


OBSERVABLES: dict[str, Observable] = {}


def register_observable(name: str, observable: Observable) -> None:
    """Make `observable` available under `name`; one that exists is replaced."""
    OBSERVABLES[name] = observable


def describe() -> str:
    """The table of observables: name, cost of one head, and what it asks for."""
    lines = [f"{'observable':<20} {'cost':<16} when"]
    for name, o in OBSERVABLES.items():
        needs = ["a tile map"] * o.needs_map + ["as many queries as keys"] * o.needs_square
        when = ("asked for" if o.expensive else "always") + (f"; needs {', '.join(needs)}" if needs else "")
        lines.append(f"{name:<20} {o.cost:<16} {when}")
    return "\n".join(lines)


def check_names(names: Iterable[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: a name is not registered; the message lists those that are.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in OBSERVABLES]
    if unknown:
        raise ValueError(f"no observable {', '.join(unknown)}: must be of {', '.join(OBSERVABLES)}")
    return wanted


@torch.no_grad()
def observables(
    weights: Tensor, names: Iterable[str] | None = None, *, tile_map: TileMap | None = None, tile: int = 64
) -> dict[str, Tensor]:
    """Observables of attention `weights` (batch, heads, queries, keys): (batch, heads) or (batch, heads, ...) each.

    Args:
        weights: exact attention probabilities.
        names: of `OBSERVABLES`; by default the cheap ones that the arguments allow.
        tile_map: the tiles kept of this attention.
        tile: tokens of a tile where there is no tile map.

    Raises:
        ValueError: an unknown name, an observable that needs what is not there, weights or a map of another shape.
    """
    if weights.ndim != 4 or weights.numel() == 0:
        raise ValueError(f"weights must be (batch, heads, queries, keys), got {tuple(weights.shape)}")
    if tile_map is not None and not _fits(tile_map, weights):
        raise ValueError(f"a tile map {tile_map.shape} is not of weights {tuple(weights.shape)}")
    heads = Heads(weights.to(torch.promote_types(weights.dtype, torch.float32)), tile_map, tile)
    if names is None:
        wanted = [name for name, o in OBSERVABLES.items() if not o.expensive and not _missing(o, heads)]
    else:
        wanted = check_names(names)
    for name in wanted:
        missing = _missing(OBSERVABLES[name], heads)
        if missing:
            raise ValueError(f"{name} needs {missing}")
    return {name: OBSERVABLES[name].function(heads) for name in wanted}


def entropy(heads: Heads) -> Tensor:
    """Mean Shannon entropy of the rows that see a key: (batch, heads), nats."""
    return _mean_rows(-torch.special.xlogy(heads.weights, heads.weights).sum(-1), _alive(heads.weights))


def fisher_length(heads: Heads) -> Tensor:
    """Mean Fisher-Rao distance of neighbouring rows that see a key: (batch, heads), radians; NaN for a single row."""
    alive = _alive(heads.weights)
    step = fisher.distance(heads.weights[..., :-1, :], heads.weights[..., 1:, :])
    return _mean_rows(step, alive[..., :-1] & alive[..., 1:])


def kept_fidelity(heads: Heads) -> Tensor:
    """Mean fidelity of rows and what their exact tiles keep of them: (batch, heads); 0 for a row that keeps nothing."""
    assert heads.tile_map is not None  # `needs_map`
    kept = heads.tile_map.exact.repeat_interleave(heads.tile_map.query_tile, 2)
    kept = kept.repeat_interleave(heads.tile_map.key_tile, 3)[..., : heads.weights.shape[2], : heads.weights.shape[3]]
    value = fidelity(from_probabilities(heads.weights), from_probabilities(heads.weights * kept))
    return _mean_rows(value.nan_to_num(0.0), _alive(heads.weights))


def scale_energies(heads: Heads) -> Tensor:
    """Shares of the squared norm by scale, `crystal.scales.map_energies` over its sum: (batch, heads, scales + 1)."""
    energies = map_energies(heads.weights)
    return energies / energies.sum(-1, keepdim=True)


def forman_curvature(heads: Heads) -> Tensor:
    """Mean Forman curvature of the edges of the tile graph: (batch, heads); NaN without edges."""
    return _mean_edges(heads, tile_graph.forman)


def ollivier_curvature(heads: Heads) -> Tensor:
    """Mean Ollivier curvature of the edges of the tile graph: (batch, heads); NaN without edges."""
    return _mean_edges(heads, tile_graph.ollivier)


def effective_rank(heads: Heads) -> Tensor:
    """e^S of the density matrix of each head: (batch, heads), in [1, queries]."""
    return head_entropy(heads.weights).exp()


def commutator_norm(heads: Heads) -> Tensor:
    """Mean `quantum.operators.noncommutativity` with the layer's other heads: (batch, heads); 0 for a single head."""
    return noncommutativity(heads.weights).sum(-1) / max(1, heads.weights.shape[1] - 1)


register_observable("entropy", Observable(entropy, "O(n^2)"))
register_observable("fisher_length", Observable(fisher_length, "O(n^2)"))
register_observable("fidelity", Observable(kept_fidelity, "O(n^2)", needs_map=True))
register_observable("scale_energies", Observable(scale_energies, "O(n^2 log n)"))
register_observable("forman_curvature", Observable(forman_curvature, "O(n^2 + T^3)", needs_square=True))
register_observable("effective_rank", Observable(effective_rank, "O(n^3)", True))
register_observable("commutator_norm", Observable(commutator_norm, "O(H n^3)", True, needs_square=True))
register_observable("ollivier_curvature", Observable(ollivier_curvature, "O(n^2 + T^2 d^3)", True, needs_square=True))


def _missing(observable: Observable, heads: Heads) -> str | None:
    if observable.needs_map and heads.tile_map is None:
        return "the tile map of a tiled call (tile_map=...)"
    if observable.needs_square and heads.weights.shape[2] != heads.weights.shape[3]:
        return "as many queries as keys"
    return None


def _fits(tile_map: TileMap, weights: Tensor) -> bool:
    query_tiles, key_tiles = -(-weights.shape[2] // tile_map.query_tile), -(-weights.shape[3] // tile_map.key_tile)
    return tile_map.shape == (*weights.shape[:2], query_tiles, key_tiles)


def _alive(weights: Tensor) -> Tensor:
    return weights.sum(-1) > 0


def _mean_rows(value: Tensor, alive: Tensor) -> Tensor:
    """Mean of `value` (batch, heads, rows) over the rows that are alive; NaN without any."""
    return torch.where(alive, value, 0.0).sum(-1) / alive.sum(-1)


def _mean_edges(heads: Heads, curvature: Callable[[Tensor], Tensor]) -> Tensor:
    tile_map = heads.tile_map
    if tile_map is not None and tile_map.query_tile == tile_map.key_tile:
        affinity = (tile_graph.tile_graph(tile_map.exact) > 0).double()
    else:
        mass = coarsen(heads.weights, heads.tile)
        affinity = (tile_graph.tile_graph(mass, 1 / mass.shape[-1]) > 0).double()
    return curvature(affinity).sum((-2, -1)) / affinity.sum((-2, -1))
