"""Reading the mask rules of Transformers: from a `mask_function` to one interval of keys per query.

The library describes a mask by nested closures. Every closure it makes from one factory shares the code object of
that factory, so comparing code objects tells without doubt which rule a closure is; its cells hold the parameters.
A rule that is not one of those listed here has no interval form and is left to `MaskRule`, which asks the closure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils as library

MaskFunction = Callable[..., Any]
_FAR = 1 << 60


def _code(function: MaskFunction) -> object:
    return getattr(function, "__code__", None)


_AND = _code(library.and_masks(library.causal_mask_function))
_WINDOW = _code(library.sliding_window_overlay(1))
_SYMMETRIC = _code(library.sliding_window_bidirectional_overlay(1))
_CHUNKED = _code(library.chunked_overlay(1, torch.zeros(1)))
_PADDING = _code(library.padding_mask_function(torch.zeros(1, 1)))
_PACKED = _code(library.packed_sequence_mask_function(torch.zeros(1, 1)))
_REMAP: object = None  # older releases do not remap positions
if hasattr(library, "remap_positions_for_packed_sequence"):
    _REMAP = _code(library.remap_positions_for_packed_sequence(library.causal_mask_function, torch.zeros(1, 1)))


class UnknownRuleError(Exception):
    """The mask function has no interval form that this module knows."""


@dataclass(frozen=True)
class Rows:
    """Where the queries stand: `position` as a rule sees them, `index` in the whole sequence.

    Both are int64 (batch or 1, queries); they differ only inside packed documents. `runs` holds, inside packed
    documents, the first and one past the last index of the document of every token: int64 (batch or 1, tokens).
    """

    index: Tensor
    position: Tensor
    runs: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Bounds:
    """Keys first <= k < last, int64 (batch or 1, queries) each, and the `valid` tables (batch, tokens) bool."""

    first: Tensor
    last: Tensor
    valid: tuple[Tensor, ...] = ()

    def meet(self, other: Bounds) -> Bounds:
        """Keys in both."""
        first, last = torch.maximum(self.first, other.first), torch.minimum(self.last, other.last)
        return Bounds(first, last, self.valid + other.valid)


def bounds_of(function: MaskFunction, rows: Rows) -> Bounds:
    """The keys that `function` lets each of `rows` see, in the coordinates of `rows.position`.

    Raises:
        UnknownRuleError: the function is not a rule of the library with an interval form.
    """
    q, far = rows.position, torch.full_like(rows.position, _FAR)
    if function is library.causal_mask_function:
        return Bounds(-far, q + 1)
    if function is library.bidirectional_mask_function:
        return Bounds(-far, torch.where(q >= 0, far, -far))
    code, cells = _code(function), _cells(function)
    if code is _WINDOW:
        return Bounds(q - _integer(cells["sliding_window"]) + 1, far)
    if code is _SYMMETRIC:
        width = _integer(cells["sliding_window"])
        return Bounds(q - width, q + width + 1)
    if code is _CHUNKED:
        return _chunked(rows, _integer(cells["chunk_size"]), cells["left_padding"])
    if code is _AND:
        return _intersection(cells["mask_functions"], rows)
    if code is _PADDING and rows.runs is None:
        return Bounds(-far, far, (cells["padding_mask"],))
    if code is _PACKED and rows.runs is None:
        return _packed(rows, _runs(cells["packed_sequence_mask"]))
    raise UnknownRuleError


def _cells(function: MaskFunction) -> dict[str, Any]:
    """The variables a closure holds, by name."""
    names = getattr(_code(function), "co_freevars", ())
    cells = getattr(function, "__closure__", None) or ()
    return {name: cell.cell_contents for name, cell in zip(names, cells, strict=True)}


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UnknownRuleError
    return value


def _chunked(rows: Rows, size: int, left_padding: Tensor) -> Bounds:
    pad = left_padding.to(rows.position)[:, None]
    first = (rows.position - pad).div(size, rounding_mode="floor").long() * size + pad
    return Bounds(first, first + size)


def _intersection(functions: tuple[MaskFunction, ...], rows: Rows) -> Bounds:
    """All rules at once; a remapping of positions is read together with the documents it belongs to."""
    documents = [_cells(f)["packed_sequence_mask"] for f in functions if _code(f) is _PACKED]
    far = torch.full_like(rows.position, _FAR)
    result = Bounds(-far, far)
    for function in functions:
        if _REMAP is None or _code(function) is not _REMAP:
            result = result.meet(bounds_of(function, rows))
        elif len(documents) == 1 and rows.runs is None:
            result = result.meet(_remapped(function, documents[0], rows))
        else:
            raise UnknownRuleError
    return result


def _packed(rows: Rows, runs: tuple[Tensor, Tensor]) -> Bounds:
    if int(rows.index.max()) >= runs[0].shape[1]:
        raise UnknownRuleError
    return Bounds(runs[0][:, rows.index[0]], runs[1][:, rows.index[0]])


def _runs(ids: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last token of each token's document: int64 (batch, tokens) each.

    Args:
        ids: (batch, tokens), the document of each token.

    Raises:
        UnknownRuleError: a document is not one contiguous run.
    """
    change = ids[:, 1:] != ids[:, :-1]
    ordered = ids.sort(-1).values
    if bool((change.sum(-1) != (ordered[:, 1:] != ordered[:, :-1]).sum(-1)).any()):
        raise UnknownRuleError
    length = ids.shape[1]
    index = torch.arange(length, device=ids.device).expand(ids.shape)
    opens = torch.nn.functional.pad(change, (1, 0), value=True)
    closes = torch.nn.functional.pad(change, (0, 1), value=True)
    first = torch.where(opens, index, 0).cummax(-1).values
    last = torch.where(closes, index + 1, length).flip(-1).cummin(-1).values.flip(-1)
    return first, last


def _remapped(function: MaskFunction, ids: Tensor, rows: Rows) -> Bounds:
    """Bounds of a rule that looks at positions inside documents, as indices of the sequence.

    Positions must rise by one inside every document, so that index minus position is constant there.
    """
    cells = _cells(function)
    positions, runs = cells["position_ids"].long(), _runs(ids)
    inside = runs[0][:, 1:] == runs[0][:, :-1]
    if positions.shape != ids.shape or bool((inside & (positions.diff(dim=-1) != 1)).any()):
        raise UnknownRuleError
    index = rows.index.expand(len(positions), -1)
    local = positions[:, rows.index[0]] if int(index.max()) < positions.shape[1] else None
    if local is None:
        raise UnknownRuleError
    inner = bounds_of(cells["mask_function"], replace(rows, index=index, position=local, runs=runs))
    shift = index - local
    return _packed(rows, runs).meet(Bounds(inner.first + shift, inner.last + shift, inner.valid))


def evaluate(function: MaskFunction, b: Tensor, h: Tensor, q: Tensor, k: Tensor, use_vmap: bool) -> Tensor:
    """`function` at index tensors of broadcastable shapes: bool tensor of the broadcast shape.

    Args:
        function: the rule, taking batch, head, query and key index.
        b: batch indices; `h`, `q`, `k` likewise, in the coordinates of the function.
        use_vmap: call the function with one index of each kind at a time, as it may need it.
    """
    shape = torch.broadcast_shapes(b.shape, h.shape, q.shape, k.shape)
    if not use_vmap:
        return torch.as_tensor(function(b, h, q, k), device=q.device).bool().expand(shape)
    indices = [x.reshape((1,) * (len(shape) - x.ndim) + tuple(x.shape)) for x in (b, h, q, k)]
    for axis in reversed(range(len(shape))):
        if shape[axis] != 1:
            axes = tuple(0 if x.shape[axis] != 1 else None for x in indices)
            function = torch.vmap(function, in_dims=axes, out_dims=0)
    with TransformGetItemToIndex():
        result: Tensor = function(*(x.squeeze() for x in indices))
    return result.bool().reshape(shape)
