"""`AATCache`: Transformers' `DynamicCache` without a copy of the whole cache at every token, with tile summaries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from aat_hf.tiling.summaries import TileSummaries

_LEAST_ROOM = 64  # tokens that a cache has room for after it grew


class AATCache(DynamicCache):
    """A cache for `generate` and for models that decode token by token.

    Layers of full attention append to memory with room for more, and their keys have the summaries that attention
    "aat" needs to read only part of them. All other layers (sliding windows, states) are Transformers' own. Where
    gradients are recorded, a graph is compiled or layers are offloaded, it does what `DynamicCache` does.

    Args:
        ddp_cache_data, config, offloading, offload_only_non_sliding: as of `DynamicCache`.

    Example:
        >>> cache = aat_hf.AATCache(config=model.config)  # doctest: +SKIP
        >>> model.generate(**inputs, past_key_values=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        ddp_cache_data: Iterable[tuple[Tensor | None, ...]] | None = None,
        config: PretrainedConfig | None = None,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:
        super().__init__(ddp_cache_data, config, offloading, offload_only_non_sliding)
        if offloading:  # memory with room for more would stay on the device
            return
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = AATLayer
        self.layers = [AATLayer.holding(layer) if type(layer) is DynamicLayer else layer for layer in self.layers]


class AATLayer(DynamicLayer):
    """Keys and values of one layer of full attention; tensors that `update` returned are never changed."""

    keys: Any  # a tensor once the layer is initialised
    values: Any
    _summaries: TileSummaries | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)  # type: ignore[no-untyped-call]
        self._forget()

    @classmethod
    def holding(cls, layer: DynamicLayer) -> AATLayer:
        """A layer with the keys and values of another."""
        made = cls()
        made.__dict__.update(layer.__dict__)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states (batch, kv_heads, tokens, dim); returns all keys and all values."""
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        alike = _alike(self.keys, key_states) and _alike(self.values, value_states)
        if torch.is_grad_enabled() or not alike:  # memory that a graph refers to must not change
            self._forget()
            return super().update(key_states, value_states, *args, **kwargs)
        if self._summaries is None or not self._summaries.are_of(self.keys):  # replaced or changed by somebody else
            self._summaries = TileSummaries()
        self.keys = self._key_rows.append(self.keys, key_states)
        self.values = self._value_rows.append(self.values, value_states)
        self._summaries.note(self.keys)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """See `DynamicLayer.crop`."""
        remove = super().crop
        if self.get_seq_length():
            self._change(lambda: remove(tokens_to_remove), lambda summaries: summaries.crop(self.get_seq_length()))

    def reset(self) -> None:
        """See `DynamicLayer.reset`."""
        self.keys = self.values = None
        self.is_initialized = False
        self._forget()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """See `CacheLayerMixin.reorder_cache`."""
        reorder = super().reorder_cache
        self._change(lambda: reorder(beam_idx), lambda summaries: summaries.select(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `DynamicLayer.batch_repeat_interleave`."""
        repeat, index = super().batch_repeat_interleave, self._entries().repeat_interleave(repeats)
        self._change(lambda: repeat(repeats), lambda summaries: summaries.select(index))

    def batch_select_indices(self, indices: Tensor) -> None:
        """See `DynamicLayer.batch_select_indices`."""
        select, entries = super().batch_select_indices, self._entries()
        self._change(lambda: select(indices), lambda summaries: summaries.select(entries[indices.cpu()]))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the tokens alone, as two layers must not append to the same memory."""
        state = {name: value for name, value in self.__dict__.items() if name not in _OWN}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)

    def _forget(self) -> None:
        self._key_rows, self._value_rows = _Rows(), _Rows()
        self._summaries = None

    def _entries(self) -> Tensor:
        """Numbers of the batch entries: (batch,)."""
        return torch.arange(len(self.keys) if self.get_seq_length() else 0)

    def _change(self, change: Callable[[], None], follow: Callable[[TileSummaries], None]) -> None:
        """Call `change`, and `follow` with the summaries if they are those of the keys."""
        known = self._summaries is not None and self._summaries.are_of(self.keys)
        with _counting_changes():
            change()
        if known and self._summaries is not None:
            follow(self._summaries)
            self._summaries.note(self.keys)


_OWN = ("_key_rows", "_value_rows", "_summaries")


def _alike(seen: Tensor, new: Tensor) -> bool:
    """Whether `new` (batch, heads, tokens, dim) can stand after `seen`, which has one dimension before any token."""
    if type(new) is not Tensor or new.ndim != 4 or seen.dtype != new.dtype or seen.device != new.device:
        return False
    return seen.ndim == 1 or (*seen.shape[:2], *seen.shape[3:]) == (*new.shape[:2], new.shape[3])


@contextmanager
def _counting_changes() -> Iterator[None]:
    """Tensors made inside count how often they are changed, which those of inference mode do not."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Rows:
    """Memory with room for more, in which a tensor (batch, heads, tokens, dim) grows at its end."""

    def __init__(self) -> None:
        self._room: Tensor | None = None  # (batch, heads, room for tokens, dim)
        self._grown: Tensor | None = None  # what `append` returned last

    def append(self, seen: Tensor, new: Tensor) -> Tensor:
        """`seen` with `new` after it: a view of the memory, to which `seen` is copied if it is not what grew there."""
        start = seen.shape[2] if seen.ndim == 4 else 0
        end = start + new.shape[2]
        room = self._room
        if room is None or seen is not self._grown or seen.data_ptr() != room.data_ptr() or end > room.shape[2]:
            with _counting_changes():
                room = new.new_empty((*new.shape[:2], end + max(end // 4, _LEAST_ROOM), new.shape[3]))
            if start:
                room[:, :, :start] = seen
        room[:, :, start:end] = new
        self._room, self._grown = room, room[:, :, :end]
        return self._grown
