"""Key orders: a balanced tree in key space, so that a run of keys is a cluster of like keys, not of neighbours.

Inside a chunk the keys are halved at the median of their first principal axis until `leaf` are left (a k-d tree on
principal axes: Sproull 1991, Refinements to nearest-neighbor searching in k-dimensional trees), or of their coordinate
of the largest variance (a k-d tree: Friedman, Bentley and Finkel 1977). Every node of a level is halved at once:
O(keys * head_dim) a level. A run of 2^m adjoining leaves is a node of the tree again, so one order serves all key tiles
from `leaf` up to the chunk.

Selection keeps keys in the text's order: `aat bench order` says what this order would change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aat_hf.tiling.masks import FULL

_ITERATIONS = 8  # of the power method; the halves need the axis roughly


@torch.no_grad()
def content_order(keys: Tensor, chunk: int, leaf: int, first: int = 0, axis: str = "principal") -> Tensor:
    """The order of the keys: position p of the reordered keys holds key `order[..., p]`.

    Args:
        keys: (batch, heads, keys, head_dim), finite.
        chunk: keys that are ordered together, leaf * 2^m.
        leaf: keys of the smallest clusters.
        first: where the first chunk begins. Keys before it, and those after the last whole chunk, stay where they are.
        axis: that a node is halved along, "principal" or "coordinate".

    Returns:
        (batch, heads, keys) int64, a permutation inside every chunk. It depends on nothing but the arguments; keys of
        equal projection stay in the text's order. `keys.gather(2, order[..., None].expand_as(keys))` reorders them,
        with gradient.

    Raises:
        ValueError: chunk is not leaf * 2^m, first is negative, or axis is unknown.
    """
    halvings = (chunk // leaf).bit_length() - 1 if 0 < leaf <= chunk else -1
    if halvings < 0 or leaf << halvings != chunk:
        raise ValueError(f"chunk = {chunk}: must be leaf = {leaf} times a power of two")
    if first < 0:
        raise ValueError(f"first = {first}: must not be negative")
    if axis not in AXES:
        raise ValueError(f"axis = {axis!r}: must be one of {', '.join(AXES)}")
    batch, heads, length, dim = keys.shape
    chunks = max(0, length - first) // chunk
    inside = slice(first, first + chunks * chunk)
    order = torch.arange(length, device=keys.device).expand(batch, heads, length).clone()
    x = keys[:, :, inside].to(torch.promote_types(keys.dtype, torch.float32))
    node, index = x.reshape(-1, chunk, dim), order[:, :, inside].reshape(-1, chunk)
    for _ in range(halvings):
        by_projection = AXES[axis](node).argsort(dim=-1, stable=True)
        index = index.gather(1, by_projection)
        node = node.gather(1, by_projection[..., None].expand_as(node))
        node, index = (part.reshape(-1, part.shape[1] // 2, *part.shape[2:]) for part in (node, index))
    order[:, :, inside] = index.view(batch, heads, -1)
    return order


def closed_tiles(states: Tensor, forced: Tensor, key_tile: int, chunk: int, first: int = 0) -> Tensor:
    """Tiles that may hold reordered keys: those of chunks that a query tile sees whole and keeps no tile of by rule.

    Args:
        states: (batch or 1, heads or 1, query_tiles, key_tiles) how the mask meets each tile pair.
        forced: bool, broadcastable to `states`: tiles that are exact in any case, such as the local band.
        key_tile: keys of a tile; divides chunk and first.
        chunk, first: of `content_order`.

    Returns:
        bool, broadcast shape of `states` and `forced`. The others keep the text's order.

    Raises:
        ValueError: key_tile does not divide chunk and first.
    """
    if chunk % key_tile or first % key_tile:
        raise ValueError(f"key_tile = {key_tile}: must divide chunk = {chunk} and first = {first}")
    open_to = (states != FULL) | forced
    each, begin = chunk // key_tile, first // key_tile
    chunks = max(0, states.shape[-1] - begin) // each
    inside = slice(begin, begin + chunks * each)
    closed = torch.zeros_like(open_to)
    whole = ~open_to[..., inside].unflatten(-1, (chunks, each)).any(-1)
    closed[..., inside] = whole.repeat_interleave(each, -1)
    return closed


def _on_principal_axis(node: Tensor) -> Tensor:
    """The keys of each node (nodes, size, dim) on its first principal axis: (nodes, size).

    The power method on the covariance, which is never formed, from the key farthest from the mean. That key also
    decides the axis's sign; equal keys give zeros. Products by elements: nodes are too small for matrix products.
    """
    centred = node - node.mean(1, keepdim=True)
    farthest = centred.square().sum(-1).argmax(-1)
    axis = centred.take_along_dim(farthest[:, None, None], 1)  # [nodes, 1, dim]
    for _ in range(_ITERATIONS):
        along = (centred * axis).sum(-1, keepdim=True)
        axis = torch.nn.functional.normalize((along * centred).sum(1, keepdim=True), dim=-1)
    return (centred * axis).sum(-1)


def _widest_coordinate(node: Tensor) -> Tensor:
    """The coordinate of the keys of each node (nodes, size, dim) that varies most: (nodes, size)."""
    widest = (node - node.mean(1, keepdim=True)).square().sum(1).argmax(-1)
    return node.take_along_dim(widest[:, None, None], 2)[..., 0]


AXES: dict[str, Callable[[Tensor], Tensor]] = {"principal": _on_principal_axis, "coordinate": _widest_coordinate}
