"""A tile map as text: two query tiles to a line of Unicode block characters."""

from __future__ import annotations

import shutil
import sys
from typing import Any

import torch
from torch import Tensor

# States of a cell, in the order in which one covers another when cells are pooled.
_OUTSIDE, _CULLED, _COARSE, _EXACT = range(4)

_BLOCKS = "█ exact   ░ coarse   · culled   (blank: masked)"
_ASCII = "# exact   + coarse   . culled   (blank: masked)"


def render_map(report: Any, layer: int | None = None, head: int | None = None) -> str:
    """One head's tile map as a picture with a title, or why there is none.

    Args:
        report: What `aat_hf.record(model, keep_maps=True)` gave.
        layer: Index of the layer; the one with the most typical head when None.
        head: The head; the one nearest to the average density when None.
    """
    records = [record for record in report.layers if record.tile_map is not None]
    if layer is not None:
        records = [record for record in records if record.layer_idx == layer]
    if not records:
        which = "no layer was" if layer is None else f"layer {layer} was not"
        return f"No tile map: {which} tiled."
    heads = len(_head_density(records[0]))
    if head is not None and not 0 <= head < heads:
        return f"No head {head}: the model has heads 0 to {heads - 1}."
    record, head = _typical(records, head)
    tiles = record.tile_map
    states, allowed = tiles.to_dense()[0, head], tiles.allowed()[0, head]
    title = (
        f"{record.name}, head {head}: density {float(_head_density(record)[head]):.3f}, "
        f"{states.shape[0]} query tiles (down) by {states.shape[1]} key tiles (across)"
    )
    tall = max(1, tiles.query_tile // tiles.key_tile)  # as high as it is wide, on paper
    states, allowed = (one.repeat_interleave(tall, 0) for one in (states, allowed))
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    width = min(96, max(16, shutil.get_terminal_size().columns - 2))
    picture = draw_tiles(states, allowed, width=width, plain=plain)
    return f"{title}\n{_ASCII if plain else _BLOCKS}\n{picture}"


def _head_density(record: Any) -> Tensor:
    """Density of each head, averaged over a batch if there is one: (heads,)."""
    density: Tensor = record.density.float().cpu()
    return density.reshape(-1, density.shape[-1]).mean(0)


def _typical(records: list[Any], head: int | None) -> tuple[Any, int]:
    """The record and head whose density is nearest to the average, a given head being kept."""
    density = torch.stack([_head_density(record) for record in records])  # [R, H]
    distance = (density - density.mean()).abs()
    if head is not None:
        return records[int(distance[:, head].argmin())], head
    index, chosen = divmod(int(distance.argmin()), density.shape[1])
    return records[index], chosen


def draw_tiles(states: Tensor, allowed: Tensor, *, width: int = 96, plain: bool = False) -> str:
    """Draw one head's tile map.

    Args:
        states: 0 culled, 1 coarse, 2 exact, (query tiles, key tiles).
        allowed: Whether the mask leaves anything of the tile, same shape.
        width: Most characters to a line; a larger map is pooled, a cell then showing the strongest
            state among its tiles.
        plain: ASCII only, for terminals that cannot show block characters.

    Returns:
        The lines, rows being query tiles and columns key tiles.
    """
    cells = torch.where(allowed.bool().cpu(), states.cpu().long() + 1, _OUTSIDE)
    cells = _pool(cells, -(-cells.shape[1] // width))
    if cells.shape[0] % 2:
        cells = torch.cat([cells, torch.full_like(cells[:1], _OUTSIDE)])
    glyph = _ascii_glyph if plain else _block_glyph
    lines = []
    for upper, lower in zip(cells[0::2].tolist(), cells[1::2].tolist(), strict=True):
        lines.append("".join(map(glyph, upper, lower)).rstrip())
    return "\n".join(lines)


def _pool(cells: Tensor, factor: int) -> Tensor:
    """Strongest state of each factor-by-factor block, the last ones possibly smaller."""
    if factor <= 1:
        return cells
    rows, columns = (-(-size // factor) for size in cells.shape)
    padded = cells.new_full((rows * factor, columns * factor), _OUTSIDE)
    padded[: cells.shape[0], : cells.shape[1]] = cells
    return padded.reshape(rows, factor, columns, factor).amax(dim=(1, 3))


def _block_glyph(upper: int, lower: int) -> str:
    """The character for two cells, one above the other."""
    if upper == _EXACT:
        return "█" if lower == _EXACT else "▀"
    if lower == _EXACT:
        return "▄"
    return {_OUTSIDE: " ", _CULLED: "·", _COARSE: "░"}[max(upper, lower)]


def _ascii_glyph(upper: int, lower: int) -> str:
    """The same where only ASCII can be printed."""
    return " .+#"[max(upper, lower)]
