"""The named selectors, each a function from a `Scene` to estimated tile masses, and the registry they live in.

Estimates are mean Born probabilities over the rows of a query tile: they sum to one (less what sinks take).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aat_hf.tiling.layout import group_heads, sampled_rows, tile_keys
from aat_hf.tiling.masks import NONE
from aat_hf.tiling.measure import RoughKeys, RowMasses, mean_over_query_tiles, measure_query_tiles
from aat_hf.tiling.moments import merge, summarise
from aat_hf.tiling.predict import predict_query_tiles
from aat_hf.tiling.select import Scene, Selector

SELECTORS: dict[str, Selector] = {}
_NEIGHBOURS = 0.1  # weight of the query tiles before and after in `mix`
_CHUNK_ELEMENTS = 1 << 24  # row probabilities held at a time (64 MiB)


def register_selector(name: str, selector: Selector) -> None:
    """Make `selector` available as `AATConfig(selector=name)`."""
    SELECTORS[name] = selector


def get_selector(name: str) -> Selector:
    """The selector of this name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in SELECTORS:
        raise ValueError(f"AATConfig.selector = {name!r}: must be one of {', '.join(sorted(SELECTORS))}")
    return SELECTORS[name]


def measured(scene: Scene) -> Tensor:
    """Measured Born probabilities of every `sample_stride`-th row, `rough` ones (`measure_rows`)."""
    return _measured(scene, scene.config.sample_stride, scene.rough)


def moments(scene: Scene) -> Tensor:
    """Second-order prediction from sub-tile moments for every `predict_stride`-th row."""
    how = (scene.config, scene.scale, scene.softcap, scene.sinks, scene.rough)
    return predict_query_tiles(scene.q, scene.k, scene.mask, scene.moments, *how)


def mix(scene: Scene) -> Tensor:
    """Mean of `measured` and `moments`, which fail on different heads, with some of the neighbouring query tiles'.

    What rows near by want is likely wanted between the rows looked at, too.
    """
    return blend(measured(scene), moments(scene), scene.states)


def oracle(scene: Scene) -> Tensor:
    """Exact mean tile masses of all rows: the cost of dense attention; for comparison."""
    return _measured(scene, 1)


def pooled(scene: Scene) -> Tensor:
    """softmax of mean query times mean key (SpargeAttn, Zhang et al. 2025)."""
    keys = merge(scene.moments).mean[..., 0, :]
    return _softmax_tiles(scene, _by_head(scene, _mean_queries(scene)) @ keys.mT * scene.scale)


def box(scene: Scene) -> Tensor:
    """softmax of the upper bound sum_d max(q_d kmin_d, q_d kmax_d) at the mean query (Quest, Tang et al. 2024)."""
    k = tile_keys(_wide(scene.k), scene.config.key_tile)
    exists = torch.arange(k.shape[2] * k.shape[3], device=k.device).view(k.shape[2:4]) < scene.k.shape[2]
    low = k.masked_fill(~exists[..., None], float("inf")).amin(3)
    high = k.masked_fill(~exists[..., None], float("-inf")).amax(3)
    q = _by_head(scene, _mean_queries(scene))
    return _softmax_tiles(scene, (q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT) * scene.scale)


def antidiagonal(scene: Scene, stride: int = 8) -> Tensor:
    """Sums of scores along antidiagonals of `stride` x `stride` blocks (XAttention, Xu et al. 2025)."""
    batch, heads, queries, _ = scene.q.shape
    q = torch.nn.functional.pad(_wide(scene.q), (0, 0, 0, -queries % scene.config.query_tile))
    k = tile_keys(_wide(scene.k), scene.config.key_tile).flatten(2, 3)
    q = q.unflatten(2, (-1, stride)).flatten(3)  # [B, H, queries / stride, stride * D]
    k = k.unflatten(2, (-1, stride)).flip(3).flatten(3)
    scores = (group_heads(q, k.shape[1]) @ k.mT * (scene.scale / stride)).view(batch, heads, q.shape[2], -1)
    row = (torch.arange(q.shape[2], device=q.device) * stride + stride - 1).clamp(max=queries - 1)
    key = (torch.arange(k.shape[2], device=q.device) * stride).clamp(max=scene.k.shape[2] - 1)
    visible = scene.mask.rows(row)[..., key]
    scores = scores.masked_fill(~visible, float("-inf"))
    per_tile = _safe_softmax(scores).unflatten(-1, (-1, scene.config.key_tile // stride)).sum(-1)
    return mean_over_query_tiles(RowMasses(per_tile, torch.logsumexp(scores, -1)), scene.states.shape[2])


def blend(a: Tensor, b: Tensor, states: Tensor, weight: float = _NEIGHBOURS) -> Tensor:
    """Mean of two estimates, plus `weight` times that of the query tiles before and after, with the mean's sums.

    Args:
        a, b: (batch, heads, query_tiles, key_tiles).
        states: (batch or 1, heads or 1, query_tiles, key_tiles), NONE for tiles that the mask hides: they get nothing.
    """
    if a.device.type == "cpu" and a.dtype == b.dtype == torch.float32:
        from aat_hf.kernels import cpu_masses  # numba, loaded when needed

        return cpu_masses.blended(a, b, states, weight)
    return _blend(a, b, states, weight)


def _blend(a: Tensor, b: Tensor, states: Tensor, weight: float) -> Tensor:
    """`blend` in PyTorch, on any device."""
    mass = (a + b) / 2
    spread = mass.clone()
    spread[:, :, 1:].add_(mass[:, :, :-1], alpha=weight)
    spread[:, :, :-1].add_(mass[:, :, 1:], alpha=weight)
    spread.masked_fill_(states == NONE, 0)
    before, after = (x.sum(-1, keepdim=True) for x in (mass, spread))
    return spread.mul_(before / after.clamp(min=torch.finfo(mass.dtype).tiny))


def _measured(scene: Scene, stride: int, rough: RoughKeys | None = None) -> Tensor:
    rows = sampled_rows(scene.q.shape[2], scene.config.query_tile, stride, scene.q.device)
    how = (scene.config.key_tile, scene.scale, scene.softcap, scene.sinks)
    a_tile = scene.q.shape[0] * scene.q.shape[1] * rows.shape[1] * scene.states.shape[3]
    means = []
    for part in rows.split(max(1, _CHUNK_ELEMENTS // a_tile)):
        means.append(measure_query_tiles(scene.q, scene.k, scene.mask, part, *how, rough))
    return torch.cat(means, 2)


def _mean_queries(scene: Scene) -> Tensor:
    """Mean query of each query tile: (batch, heads, query_tiles, head_dim)."""
    return summarise(scene.q, scene.config.query_tile, 1).mean[..., 0, :]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_head(scene: Scene, q: Tensor) -> Tensor:
    return group_heads(q, scene.k.shape[1])


def _softmax_tiles(scene: Scene, scores: Tensor) -> Tensor:
    scores = scores.view(*scene.q.shape[:2], *scene.states.shape[2:])
    return _safe_softmax(scores.masked_fill(scene.states == NONE, float("-inf")))


def _safe_softmax(scores: Tensor) -> Tensor:
    """softmax over the last dimension; rows of -inf give zeros."""
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True).nan_to_num(neginf=0.0))


for _selector in (measured, moments, mix, oracle, pooled, box, antidiagonal):
    register_selector(_selector.__name__, _selector)
