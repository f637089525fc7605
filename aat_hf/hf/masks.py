"""Masks of Transformers as compact objects: the mask function "aat", and what arrives at the attention function.

The mask function returns a `LazyMask`: the library's rule, kept as a rule. `interpret` turns it into row intervals
where every part is known (causal, window, chunk, packed documents, padding); anything else stays a predicate that is
evaluated tile by tile, never guessed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.attention.flex_attention import BlockMask
from transformers import masking_utils
from transformers.masking_utils import prepare_padding_mask, sdpa_mask

from aat_hf.tiling.arguments import split_additive
from aat_hf.tiling.masks import AttentionMask, FunctionMask, IntervalMask, TensorMask, causal_mask, full_mask

_FAR = 1 << 60  # beyond every position
_INDEX_BUDGET = 1 << 28  # elements a LazyMask may turn into when a model slices it
Bounds = tuple[Tensor, Tensor]
"""First and one-past-last visible key position of each row: two (batch or 1, queries) int64."""


class LazyMask:
    """A mask as Transformers builds it, not yet evaluated; stands where a (batch, 1, queries, keys) tensor would.

    Attributes:
        mask_function: predicate of (batch, head, query, key) positions.
        padding: (batch, seen keys) bool or None.
        q_offset, kv_offset: position of the first query and of the first key.
        use_vmap: the predicate must be called with scalars under vmap.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
        attention_mask: Tensor | None = None,
        use_vmap: bool = False,
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> None:
        self.shape = torch.Size((batch_size, 1, q_length, kv_length))
        # a static cache hands over its live counter, which advances before the attention call
        self.q_offset = q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
        self.kv_offset = kv_offset
        self.mask_function = mask_function
        self.padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        self.use_vmap = use_vmap
        self.device = torch.device(device)
        self._interpreted: AttentionMask | None = None

    def dim(self) -> int:
        """4."""
        return 4

    def size(self, dim: int | None = None) -> Any:
        """Shape, or one of its numbers."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> LazyMask:
        """The mask itself."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> LazyMask:
        """The mask on another device; dtypes are ignored, the mask is boolean."""
        device = torch._C._nn._parse_to(*args, **kwargs)[0]
        if device is None or device == self.device:
            return self
        moved = copy.copy(self)
        moved._interpreted = move_mask(interpret(self), device)
        moved.device = device
        return moved

    def materialise(self) -> Tensor:
        """The mask as bool (batch, 1, queries, keys)."""
        if self._interpreted is not None:
            return self._interpreted.rows(torch.arange(self.shape[2], device=self.device)).expand(self.shape)
        tensor = sdpa_mask(
            batch_size=self.shape[0],
            q_length=self.shape[2],
            kv_length=self.shape[3],
            q_offset=self.q_offset,  # type: ignore[arg-type]  # the library passes tensors too
            kv_offset=self.kv_offset,
            mask_function=self.mask_function,
            attention_mask=self.padding,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=self.use_vmap,
            device=self.device,
        )
        assert tensor is not None  # skipping is off
        return tensor.expand(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        if self.shape.numel() > _INDEX_BUDGET:
            raise NotImplementedError(
                f"this model slices its attention mask, which would take {self.shape.numel()} elements at this length; "
                'use attn_implementation="sdpa" for it, or shorter inputs'
            )
        return self.materialise()[index]


def aat_mask(**kwargs: Any) -> Any:
    """The mask function "aat": arguments as `transformers.masking_utils.sdpa_mask`, returns a `LazyMask`."""
    prepared = kwargs.get("attention_mask")
    if isinstance(prepared, LazyMask | BlockMask) or (isinstance(prepared, Tensor) and prepared.ndim == 4):
        return prepared
    for name in ("allow_is_causal_skip", "allow_is_bidirectional_skip", "local_size", "dtype", "config"):
        kwargs.pop(name, None)
    return LazyMask(**kwargs)


def interpret(mask: LazyMask) -> AttentionMask:
    """The mask in the core's terms: intervals where the rule is known, else a predicate."""
    if mask._interpreted is None:
        mask._interpreted = _interpret(mask)
    return mask._interpreted


def _interpret(mask: LazyMask) -> AttentionMask:
    batch, _, queries, keys = mask.shape
    bounds = bounds_of(mask)
    if bounds is None:
        return FunctionMask(_predicate(mask), batch, queries, keys, mask.device)
    valid = None
    if mask.padding is not None:
        valid = mask.padding[:, mask.kv_offset : mask.kv_offset + keys].to(mask.device, torch.bool)
        valid = None if bool(valid.all()) else valid
    return IntervalMask(*bounds, keys, valid)


def bounds_of(mask: LazyMask) -> Bounds | None:
    """First and one-past-last key (indices of this call) the rule lets each row see; None for unknown rules."""
    position = torch.arange(mask.shape[2], device=mask.device)[None] + mask.q_offset
    bounds = _bounds(mask.mask_function, position)
    return None if bounds is None else (bounds[0] - mask.kv_offset, bounds[1] - mask.kv_offset)


def _predicate(mask: LazyMask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    function, padding = mask.mask_function, mask.padding

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = q + mask.q_offset, k + mask.kv_offset
        if mask.use_vmap:
            index = torch.broadcast_tensors(b, h, q, k)
            with TransformGetItemToIndex():
                inside = torch.vmap(function)(*(x.flatten() for x in index)).view(index[0].shape)
        else:
            inside = function(b, h, q, k)
        return inside if padding is None else inside & padding[b, k].bool()

    return allowed


def _bounds(function: Callable[..., Any], position: Tensor, packed: Tensor | None = None) -> Bounds | None:
    """Visible key positions of queries at `position` (batch or 1, queries) under a known rule, else None."""
    low, high = torch.full_like(position, -_FAR), torch.full_like(position, _FAR)
    if function is masking_utils.causal_mask_function:
        return low, position + 1
    if function is masking_utils.bidirectional_mask_function:
        return low, high.where(position >= 0, low)  # the library's rule is `query position >= 0`
    if getattr(function, "__module__", None) != masking_utils.__name__:
        return None
    kind = function.__qualname__.split(".")[0]
    names, cells = function.__code__.co_freevars, function.__closure__ or ()
    values = dict(zip(names, (cell.cell_contents for cell in cells), strict=True))
    if kind == "and_masks":
        return _all(values["mask_functions"], position)
    if kind == "sliding_window_overlay":
        return position - values["sliding_window"] + 1, high
    if kind == "sliding_window_bidirectional_overlay":
        return position - values["sliding_window"], position + values["sliding_window"] + 1
    if kind == "chunked_overlay":
        size, padding = values["chunk_size"], values["left_padding"].to(position.device)[:, None]
        start = (position - padding).div(size, rounding_mode="floor") * size + padding
        return start, start + size
    if kind == "packed_sequence_mask_function":
        return _documents(values["packed_sequence_mask"])
    if kind == "remap_positions_for_packed_sequence" and packed is not None:
        return _remapped(values["mask_function"], values["position_ids"], packed)
    return None


def _all(functions: tuple[Callable[..., Any], ...], position: Tensor) -> Bounds | None:
    """Intersection of the bounds of all functions; None if one is unknown."""
    packed = None
    for function in functions:
        if getattr(function, "__qualname__", "").startswith("packed_sequence_mask_function."):
            packed = (function.__closure__ or ())[0].cell_contents
    low, high = torch.full_like(position, -_FAR), torch.full_like(position, _FAR)
    for function in functions:
        bounds = _bounds(function, position, packed)
        if bounds is None:
            return None
        low, high = torch.maximum(low, bounds[0]), torch.minimum(high, bounds[1])
    return low, high


def _documents(ids: Tensor) -> Bounds | None:
    """Bounds of each position's document; None unless ids (batch, length) never fall (documents are runs)."""
    if bool((ids.diff(dim=-1) < 0).any()):
        return None
    ids = ids.contiguous()
    return torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)


def _remapped(function: Callable[..., Any], positions: Tensor, packed: Tensor) -> Bounds | None:
    """Bounds of a rule that counts positions inside each document; None unless they count up by one."""
    same = packed.diff(dim=-1) == 0
    if bool(((positions.diff(dim=-1) != 1) & same).any()):
        return None
    bounds = _bounds(function, positions)
    if bounds is None:
        return None
    shift = torch.arange(positions.shape[-1], device=positions.device) - positions
    return bounds[0] + shift, bounds[1] + shift


def move_mask(mask: AttentionMask, device: torch.device) -> AttentionMask:
    """The mask with its tensors on `device`."""
    if isinstance(mask, IntervalMask):
        valid = None if mask.key_valid is None else mask.key_valid.to(device)
        return IntervalMask(mask.first.to(device), mask.last.to(device), mask.keys, valid)
    return TensorMask(mask.rows(torch.arange(mask.queries, device=mask.device)).to(device))


def _block_predicate(mask: BlockMask) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of a `BlockMask`: its `mask_mod` inside the blocks it lists, nothing outside."""
    listed = mask.to_dense().bool()  # [batch or 1, heads or 1, query blocks, key blocks]
    rows, columns = mask.BLOCK_SIZE

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        block = listed[b.clamp(max=listed.shape[0] - 1), h.clamp(max=listed.shape[1] - 1), q // rows, k // columns]
        return block & mask.mask_mod(b, h, q, k)

    return allowed


def from_argument(
    attention_mask: Any, *, batch: int, heads: int, queries: int, keys: int, is_causal: bool, device: torch.device
) -> tuple[AttentionMask, Tensor | None]:
    """What arrives at an attention function, as a mask and an additive bias (or None).

    Args:
        attention_mask: None (then `is_causal` decides; query i sees the keys j <= i, as in the library's SDPA),
            a `LazyMask`, a 2-D padding mask (batch, keys), a 4-D boolean or additive tensor, or a `BlockMask`.
        batch, heads, queries, keys: sizes of the call.
        is_causal: whether the layer is causal.
        device: where the call runs.

    Raises:
        TypeError: none of these.
    """
    if attention_mask is None:
        offset = 0 if queries > 1 else keys - 1
        return (causal_mask(queries, keys, device, offset) if is_causal else full_mask(queries, keys, device)), None
    if isinstance(attention_mask, LazyMask):
        if attention_mask.shape[3] == keys and attention_mask.shape[2] == queries:
            return interpret(attention_mask.to(device)), None
        return TensorMask(attention_mask.materialise()[:, :, -queries:, :keys].to(device)), None
    if isinstance(attention_mask, BlockMask):
        return FunctionMask(_block_predicate(attention_mask), batch, queries, keys, device, heads), None
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        shape = tuple(getattr(attention_mask, "shape", ()))
        raise TypeError(
            f"attention_mask is {type(attention_mask).__name__} {shape}: must be None, a tensor of 2 or 4 dimensions, "
            "or what the aat mask function returns"
        )
    if attention_mask.ndim == 2:
        seen = min(attention_mask.shape[1], keys)  # a static cache has keys nobody has seen yet
        valid = torch.nn.functional.pad(attention_mask[:, -keys:].bool(), (0, keys - seen))
        if is_causal:
            return causal_mask(queries, keys, device, seen - queries, valid), None
        return full_mask(queries, keys, device, valid), None
    tensor = attention_mask[..., :keys].expand(-1, -1, queries, -1)
    if tensor.dtype == torch.bool:
        return TensorMask(tensor), None
    allowed, bias = split_additive(tensor)
    return TensorMask(allowed), bias
