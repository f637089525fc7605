"""Which tile each position belongs to.

A user of attention gets the same ragged tiles in every function, and a clear error for a size that makes none.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_index(length: int, tile: int, device: torch.device | None = None) -> Tensor:
    """Tile of each of `length` positions: (length,) int64; the last tile may be shorter.

    Raises:
        ValueError: a tile size below 1.
    """
    if tile < 1:
        raise ValueError(f"a tile has at least one position, got size {tile}")
    return torch.arange(length, device=device) // tile
