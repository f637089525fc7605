"""What a head does: local, sink, vertical, slash, block, periodic, dense, or a pattern of your own.

What a user of attention gets: a name for every head and how much of its map each pattern accounts for, from attention
weights, from the tile masses that selection estimates, or from a tile map. Masses name heads nearly as attention does.
A tile map says where something was kept, not how much is there: it shows lines, blocks and periods outside the sink
and the local band, and cannot tell a sink or a local head from the lines that are kept beside it.

A pattern is a function from `HeadMaps` to a score in [0, 1] for every head; a head has the name of its highest score,
or "mixed" when none reaches `THRESHOLD`. `register_pattern` adds one. The structure of the part outside sink and local
band is measured by the gauge-fixed decomposition into rows, columns, offsets and blocks (`crystal.gauge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from aat_hf.crystal.gauge import Explained, Fit, block_fraction, explained, fit_scores
from aat_hf.crystal.periodic import repetition
from aat_hf.crystal.scales import coarsen
from aat_hf.tiling.masks import NONE
from aat_hf.tiling.tile_map import TileMap

THRESHOLD = 0.25
MIXED = "mixed"
_CELLS = 64  # a side of the map that attention is averaged to
_BLOCKS = range(2, 9)  # a side that "block" looks for
_FLOOR = 1e-2  # of the uniform share of a key: less attention counts as that
_TINY = torch.finfo(torch.float32).tiny
_STEPS = 12  # of the fits: fractions of variance are then right to a percent


class KeptCells(NamedTuple):
    """Fractions of exact and of allowed tiles in square cells, (1, heads, rows, columns) float32.

    All of a tile map that a classification needs, 32 kB a head at most.
    """

    kept: Tensor
    allowed: Tensor


class MassCells(NamedTuple):
    """Probability and number of allowed tiles in square cells, (1, heads, rows, columns) float32, like `KeptCells`."""

    mass: Tensor
    allowed: Tensor


@dataclass(frozen=True)
class HeadMaps:
    """Maps of heads on square cells, as patterns see them.

    Attributes:
        share: (batch, heads, rows, columns) probability of each key cell; of a tile map, equal for the kept tiles of a
            row, band and sink together counting as one.
        allowed: bool, same shape: what the mask leaves.
        band, sink: bool, same shape: at most one cell off the diagonal; the first cell that a row sees, off the band.
        far: (batch, heads) share outside sink and band.
        explained: fractions of the variance outside sink and band, each (batch, heads); 0 where there is none.
        fit: of the same cells; `fit.column` and `fit.offset` are the vertical and the slash profile.
        blocks: (batch, heads) fraction explained by square blocks alone, 2 to 8 a side.
    """

    share: Tensor
    allowed: Tensor
    band: Tensor
    sink: Tensor
    far: Tensor
    explained: Explained
    fit: Fit
    blocks: Tensor

    def mean_share(self, cells: Tensor) -> Tensor:
        """Probability of `cells` (bool, the shape of share), rows weighted by the keys they see: (batch, heads)."""
        return _row_average((self.share * cells).sum(-1), self.allowed)


Pattern = Callable[[HeadMaps], Tensor]
"""From maps to scores (batch, heads) in [0, 1]: roughly the share of the head's probability that follows it."""

PATTERNS: dict[str, Pattern] = {}


@dataclass(frozen=True)
class Patterns:
    """Names and scores of heads.

    Attributes:
        scores: by pattern, (batch, heads).
        explained: fractions of the variance outside sink and band: vertical, slash, both, block, each (batch, heads).
    """

    scores: dict[str, Tensor]
    explained: Explained

    @property
    def names(self) -> list[list[str]]:
        """Name of each head, [batch][head]."""
        heads = [{name: s[b] for name, s in self.scores.items()} for b in range(len(self.explained.both))]
        return [names_of(scores) for scores in heads]


def register_pattern(name: str, pattern: Pattern) -> None:
    """Let `classify` and reports look for `pattern` too; a name that exists is replaced.

    Raises:
        ValueError: the name is that of heads without a pattern.
    """
    if name == MIXED:
        raise ValueError(f"{MIXED!r} is the name of heads without a pattern")
    PATTERNS[name] = pattern


def names_of(scores: Mapping[str, Tensor]) -> list[str]:
    """The pattern of each head from scores (heads,) by name."""
    best, index = torch.stack(list(scores.values())).max(0)
    names = list(scores)
    pairs = zip(best.tolist(), index.tolist(), strict=True)
    return [names[i] if value >= THRESHOLD else MIXED for value, i in pairs]


@torch.no_grad()
def kept_cells(tile_map: TileMap) -> KeptCells:
    """Reduce a tile map to the cells that `classify` looks at: the mean of the batch, at most 64 cells a side."""
    kept, allowed = (
        _cells(x, tile_map.query_tile, tile_map.key_tile) for x in (tile_map.exact, tile_map.states != NONE)
    )
    return KeptCells(kept, allowed.expand(kept.shape))


@torch.no_grad()
def mass_cells(mass: Tensor, states: Tensor, query_tile: int, key_tile: int) -> MassCells:
    """Reduce tile masses to the cells that `classify` looks at, as `kept_cells` does.

    Args:
        mass: (batch, heads, query_tiles, key_tiles) probabilities, measured or estimated; NaN counts as 0.
        states: broadcastable to mass, how the mask meets each pair (`TileMap.states`).
        query_tile, key_tile: rows and keys of a tile.
    """
    found = _cells(mass.nan_to_num(nan=0.0), query_tile, key_tile, 1)
    return MassCells(found, _cells(states != NONE, query_tile, key_tile, 1).expand(found.shape))


@torch.no_grad()
def classify(
    source: TileMap | KeptCells | MassCells | Tensor, *, allowed: Tensor | None = None, tile: int | None = None
) -> Patterns:
    """Name each head by its pattern.

    In a tile map, sink and local tiles are there by setting: those of a row together count as one tile, and "local"
    says that there is little else. How much a sink holds only the attention shows.

    Args:
        source: a tile map (its batch becomes one), what is left of it or of tile masses, or attention probabilities
            (batch, heads, queries, keys); the last query stands at the last key.
        allowed: bool, broadcastable to the attention: what its mask leaves; where it is positive, by default the pairs
            up to the last positive one of each row.
        tile: tokens of attention in a cell; by default so many that 64 cells cover the keys. Periods are found from
            two cells on.

    Raises:
        ValueError: attention of another shape; a pattern gave scores of another shape than (batch, heads).
    """
    if isinstance(source, MassCells):
        maps = _of_shares(source.mass / source.mass.sum(-1, keepdim=True).clamp(min=_TINY), source.allowed)
    elif isinstance(source, Tensor):
        maps = _of_attention(source, allowed, tile)
    else:
        maps = _of_cells(kept_cells(source) if isinstance(source, TileMap) else source)
    scores = {name: pattern(maps) for name, pattern in PATTERNS.items()}
    for name, score in scores.items():
        if score.shape != maps.far.shape:
            raise ValueError(f"pattern {name!r} gave scores {tuple(score.shape)}, not {tuple(maps.far.shape)}")
    return Patterns({name: score.float().cpu() for name, score in scores.items()}, maps.explained)


def local(maps: HeadMaps) -> Tensor:
    """Probability at most one cell off the diagonal."""
    return maps.mean_share(maps.band)


def sink(maps: HeadMaps) -> Tensor:
    """Probability of the first cell a row sees."""
    return maps.mean_share(maps.sink)


def dense(maps: HeadMaps) -> Tensor:
    """Squared fraction of the cells in use, e^entropy over what a row sees: half of them is at the threshold."""
    entropy = -torch.special.xlogy(maps.share, maps.share).sum(-1)
    return _row_average(entropy.exp() / maps.allowed.sum(-1).clamp(min=1), maps.allowed).square()


def vertical(maps: HeadMaps) -> Tensor:
    """Which key it is explains the map, and no period does."""
    return maps.far * maps.explained.vertical * (1 - repetition(maps.fit.column))


def slash(maps: HeadMaps) -> Tensor:
    """The offset of query and key explains the map, and no period does."""
    return maps.far * maps.explained.slash * (1 - repetition(maps.fit.offset))


def periodic(maps: HeadMaps) -> Tensor:
    """Columns or offsets come in a period: their spectrum is Bragg peaks."""
    columns = maps.explained.vertical * repetition(maps.fit.column)
    offsets = maps.explained.slash * repetition(maps.fit.offset)
    return maps.far * torch.maximum(columns, offsets)


def block(maps: HeadMaps) -> Tensor:
    """Square blocks of cells explain the map."""
    return maps.far * maps.blocks


for _pattern in (local, sink, vertical, slash, block, periodic, dense):
    register_pattern(_pattern.__name__, _pattern)


def _cells(x: Tensor, query_tile: int, key_tile: int, divisor: int | None = None) -> Tensor:
    """Means over square cells of tiles, or sums with divisor 1, of the mean of the batch; at most `_CELLS` a side."""
    side = math.gcd(query_tile, key_tile)
    factor = _factor(key_tile // side * x.shape[3])
    x = x.float().mean(0, keepdim=True)
    x = x.repeat_interleave(query_tile // side, 2).repeat_interleave(key_tile // side, 3)
    return avg_pool2d(x, factor, ceil_mode=True, divisor_override=divisor).cpu()


def _of_cells(cells: KeptCells) -> HeadMaps:
    kept, allowed = cells.kept, cells.allowed > 0
    image = kept / torch.where(allowed, cells.allowed, 1.0)
    band, sink = _band(allowed), _sink(allowed)
    given = (kept * (band | sink)).sum(-1, keepdim=True)
    share = torch.where(band | sink, kept / torch.where(given > 0, given, 1.0), kept)
    share = share / share.sum(-1, keepdim=True).clamp(min=_TINY)
    return _head_maps(share, image, allowed)


def _of_attention(attention: Tensor, allowed: Tensor | None, tile: int | None) -> HeadMaps:
    if attention.ndim != 4 or attention.numel() == 0:
        raise ValueError(f"attention must be (batch, heads, queries, keys), got {tuple(attention.shape)}")
    # Zeros before the last positive weight may be rounding; those after it are the mask's.
    up_to_last = (attention > 0).flip(-1).cumsum(-1).flip(-1) > 0
    seen = up_to_last if allowed is None else allowed.expand(attention.shape)
    tile = _factor(attention.shape[-1]) if tile is None else tile
    wide = coarsen(attention.to(torch.promote_types(attention.dtype, torch.float32)), tile)
    return _of_shares(wide, coarsen(seen.float(), tile))


def _of_shares(share: Tensor, visible: Tensor) -> HeadMaps:
    """Maps of probabilities of cells and the number of keys that a row sees in each."""
    allowed = visible > 0
    uniform = visible / visible.sum(-1, keepdim=True).clamp(min=1e-30)
    image = (share / torch.where(allowed, uniform, 1.0)).clamp(min=_FLOOR).log()
    return _head_maps(share, image, allowed)


def _head_maps(share: Tensor, image: Tensor, allowed: Tensor) -> HeadMaps:
    band, sink = _band(allowed), _sink(allowed)
    rest = allowed & ~band & ~sink
    flat = fit_scores(image, rest, False, False).residual
    varies = flat.abs().amax((-2, -1)) > 1e-4
    fractions = explained(image, rest, max(2, -(-image.shape[-1] // max(_BLOCKS))), _STEPS)
    return HeadMaps(
        share=share,
        allowed=allowed,
        band=band,
        sink=sink,
        far=_row_average((share * rest).sum(-1), allowed),
        explained=Explained(*(torch.where(varies, x, 0.0) for x in fractions)),
        fit=fit_scores(image, rest, steps=_STEPS),
        blocks=torch.where(varies, block_fraction(flat, rest.to(flat), _BLOCKS), 0.0),
    )


def _band(allowed: Tensor) -> Tensor:
    rows, columns = allowed.shape[-2:]
    row = torch.arange(rows, device=allowed.device)[:, None] + columns - rows
    return ((row - torch.arange(columns, device=allowed.device)).abs() <= 1) & allowed


def _sink(allowed: Tensor) -> Tensor:
    return (allowed.cumsum(-1) == 1) & allowed & ~_band(allowed)


def _factor(length: int) -> int:
    """How many keys or tiles make a cell, for at most `_CELLS` a side."""
    return max(1, -(-length // _CELLS))


def _row_average(value: Tensor, allowed: Tensor) -> Tensor:
    """Mean over rows (batch, heads, rows), weighted by what they see: long rows say more about a head."""
    weight = allowed.sum(-1).to(value)
    return (value * weight).sum(-1) / weight.sum(-1).clamp(min=1)
