"""Summaries of the key tiles of a growing cache, found by the attention function through the key tensor itself.

An attention function is handed keys, not the cache they lie in. `TileSummaries.note` says which tensor they are of; a
tensor made from it, or changed since, has none.
"""

from __future__ import annotations

from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.tiling.margins import Margins
from aat_hf.tiling.moments import summarise

Room: TypeAlias = NDArray[np.float32]
"""(batch, kv_heads, tiles, head_dim) with room for more tiles."""


class TileSummaries:
    """Mean and diagonal variance of every complete key tile, made when first asked for and then kept up to date.

    Attributes:
        margins: what decoding steps have learnt about predictions from these summaries.
    """

    def __init__(self) -> None:
        self.margins = Margins()
        self._key_tile, self._count = 0, 0
        self._means: Room = np.empty((0, 0, 0, 0), np.float32)
        self._variances = self._means
        self._key: Tensor | None = None
        self._state: tuple[int, int] | None = None

    def note(self, key: Tensor) -> None:
        """From now on these are the summaries of `key` (batch, kv_heads, keys, head_dim), and of no other tensor."""
        if self._key is not None:
            _known.pop(id(self._key), None)
        self._key, self._state = key, _state(key)
        _known[id(key)] = self

    def are_of(self, key: Tensor) -> bool:
        """Whether `key` is the tensor last noted, and has the values it had then.

        Changes that PyTorch does not count (through `.data` or numpy) are not seen.
        """
        return self._key is key and self._state is not None and self._state == _state(key)

    def of(self, k: Tensor, key_tile: int) -> tuple[Room, Room, int]:
        """Means and variances of the complete tiles of k; only those that are new are computed.

        Args:
            k: (batch, kv_heads, keys, head_dim), the keys of the last call and more after them.

        Returns:
            two (batch, kv_heads, tiles or more, head_dim), of which the first `keys // key_tile` tiles count, and
            this number.
        """
        batch, kv_heads, keys, dim = k.shape
        complete = keys // key_tile
        if key_tile != self._key_tile:
            self._key_tile, self._count = key_tile, 0
        if complete > self._means.shape[2] or self._means.shape[:2] != (batch, kv_heads):
            shape = batch, kv_heads, complete + complete // 4 + 1, dim
            self._means, self._variances = self._moved(self._means, shape), self._moved(self._variances, shape)
        if complete > self._count:
            new = summarise(k[:, :, self._count * key_tile : complete * key_tile].detach(), key_tile, 1)
            self._means[:, :, self._count : complete] = new.mean[:, :, :, 0].cpu().numpy()
            self._variances[:, :, self._count : complete] = new.variance[:, :, :, 0].cpu().numpy()
            self._count = complete
        return self._means, self._variances, complete

    def crop(self, keys: int) -> None:
        """Forget what was known of keys after the first `keys`."""
        if self._key_tile:
            self._count = min(self._count, keys // self._key_tile)

    def select(self, index: Tensor) -> None:
        """Keep the batch entries `index` (batch',) int64, in that order."""
        self.margins.select(index)
        if self._count:
            entries = index.cpu().numpy()
            self._means, self._variances = self._means[entries], self._variances[entries]

    def _moved(self, old: Room, shape: tuple[int, int, int, int]) -> Room:
        """The tiles known, in memory of this shape."""
        room = np.empty(shape, np.float32)
        if self._count:
            room[:, :, : self._count] = old[:, :, : self._count]
        return room


_known: WeakValueDictionary[int, TileSummaries] = WeakValueDictionary()  # by id of the tensor, which they keep alive


def summaries_of(key: Tensor) -> TileSummaries | None:
    """The summaries of this very tensor (batch, kv_heads, keys, head_dim), unless its values were changed since."""
    found = _known.get(id(key))
    return found if found is not None and found.are_of(key) else None


def _state(x: Tensor) -> tuple[int, int] | None:
    """Where the values of `x` lie and how often they were changed; tensors of inference mode do not count it: None."""
    return None if x.is_inference() else (x.data_ptr(), x._version)
