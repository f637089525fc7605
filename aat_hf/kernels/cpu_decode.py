"""Attention of a single query to a long cache: the values of the heaviest tiles only.

Without summaries of the tiles every score is exact: the probability of each tile is the sum over its keys, so what a
head loses is known, and never above the tolerance. What is saved is reading the other tiles' values.

With summaries (`aat_hf.AATCache`) the keys of unlikely tiles are not read either. What is lost is then measured in some
of the steps, by scoring all keys, and the margins of the prediction follow, so that the mean loss meets the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.kernels import cpu_decode_loops as loops
from aat_hf.kernels.cpu_decode_inputs import FROM_MEMORY, Choice, Step, as_step, chosen, in_rows, matrix
from aat_hf.kernels.cpu_decode_predict import opened_tiles
from aat_hf.kernels.cpu_matrices import Bytes, Floats
from aat_hf.kernels.cpu_threads import run
from aat_hf.tiling.masks import FULL, NONE, PARTIAL, IntervalMask
from aat_hf.tiling.summaries import TileSummaries
from aat_hf.tiling.tile_map import EXACT, TileMap

_FOR_VALUES = 0.25  # share of the tolerance that goes to values not read where keys are left out too
_ALL = np.empty((0, 0), np.uint8)  # every tile is read
_ALL_LOST = 1 - 1e-6  # of what is kept then, float32 may hold nothing


class DecodeResult(NamedTuple):
    """Attention of one query to the tiles kept.

    Attributes:
        output: (batch, heads, 1, value_dim); lse: (batch, heads, 1) of the keys kept, without sinks.
        tile_map: the tiles whose values were read.
        lost: (batch, heads, 1) probability of the others; NaN where the query sees no key.
        measured: whether `lost` is exact; else it is the mean of recent steps that were measured.
    """

    output: Tensor
    lse: Tensor
    tile_map: TileMap
    lost: Tensor
    measured: bool


class _Scores(NamedTuple):
    """Weights 2^(score - maximum of the block).

    Attributes:
        weights: (batch * heads, at least keys).
        mass: (batch * heads, blocks * tiles of a block) their sums by tile.
        top: (batch * heads, blocks) the maxima; NaN where a score is not finite.
    """

    weights: Floats
    mass: Floats
    top: Floats


@torch.no_grad()
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: IntervalMask,
    config: AATConfig,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    summaries: TileSummaries | None = None,
) -> DecodeResult | None:
    """Attention to the fewest tiles that hold 1 - tolerance of each head's probability.

    A value that is not finite has no effect in a tile that is not kept.

    Args:
        q: (batch, heads, 1, head_dim) float32, bfloat16 or float16, on the CPU.
        k: (batch, kv_heads, keys, head_dim); v: (batch, kv_heads, keys, value_dim).
        sinks: (heads,) logits of a virtual key without a value.
        summaries: those of the tiles of k, if it has any; they learn from this step.

    Returns:
        None where exact attention is called for: a score is not finite, the heads of k or v are not whole rows in
        memory, the summaries leave hardly anything out, or were measured to leave out all that counts.
    """
    if not (in_rows(k) and in_rows(v)):
        return None
    step = as_step(q, k, mask, config.key_tile, scale, softcap)
    opened, measured, tolerance = _ALL, True, config.tolerance
    if summaries is not None:
        measured = summaries.margins.next_step(*q.shape[:2])
        found = opened_tiles(step, k, config, sinks, summaries)
        if found is None:
            if measured:
                summaries.margins.learn_exact(config.tolerance)
            return None
        opened, tolerance = found, _FOR_VALUES * tolerance
    scores = _score(step, _ALL if measured else opened)
    if np.isnan(scores.top).any():
        return None
    choice, lost = _chosen(step, scores, opened, measured, tolerance, sinks, config)
    if summaries is not None and measured:
        summaries.margins.learn(lost, config.tolerance)
        if (lost > _ALL_LOST).any():
            return None
    elif summaries is not None:
        lost = np.where(np.isnan(lost), lost, summaries.margins.expected)
    output, lse = _output(v, step, scores, choice, q.shape[:2])
    return DecodeResult(
        output,
        lse,
        _tile_map(choice.kept, step, q.shape[:2], config),
        torch.from_numpy(lost).view(*q.shape[:2], 1),
        measured,
    )


def _chosen(
    step: Step, scores: _Scores, opened: Bytes, measured: bool, tolerance: float, sinks: Tensor | None,
    config: AATConfig,
) -> tuple[Choice, NDArray[np.float64]]:  # fmt: skip
    """The tiles kept of those `opened` (without elements: of all), and the probability of the others that were scored.

    Where all were scored to measure a step, the tiles that are not `opened` are left out here.
    """
    whole = scores.mass.reshape(*scores.top.shape, -1).sum(2)
    count = len(step.sizes)
    if measured and opened.size:
        scores.mass[:, :count] *= opened[:, :count].repeat(len(step.rows) // len(opened), 0)
    choice = chosen(scores.mass, scores.top, sinks, count, np.full(len(step.rows), tolerance), config.max_kept)
    return choice, _lost(choice, whole if opened.size else None)


def _score(step: Step, opened: Bytes) -> _Scores:
    span, heads = step.span, len(step.rows)
    blocks = -(-len(step.sizes) // span.block)
    sizes = blocks * span.block * span.key_tile, blocks * span.block, blocks
    scores = _Scores(*(np.empty((heads, size), np.float32) for size in sizes))
    keys = int(opened.sum()) * span.key_tile if opened.size else len(span.starts) * span.keys
    run(loops.score, FROM_MEMORY * keys * step.rows.shape[1], step.rows, step.keys, span, step.rule, opened, *scores)
    return scores


def _lost(choice: Choice, whole: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """Probability that each head loses: (batch * heads,); `whole` (batch * heads, blocks) if `choice` saw less."""
    held, total, free = choice.sums[:, 0], choice.sums[:, 1], choice.sums[:, 2]
    if whole is not None:
        total = np.maximum((whole * choice.rescale).sum(1), held)
    with np.errstate(invalid="ignore"):  # a query that sees no key
        return (total - held) / (total + free)


def _output(v: Tensor, step: Step, scores: _Scores, choice: Choice, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The output (batch, heads, 1, value_dim) of the kept tiles, and their log-sum-exp."""
    values, starts = matrix(v)
    parts = np.empty((*scores.top.shape, v.shape[3]), np.float32)
    work = FROM_MEMORY * int(np.count_nonzero(choice.kept)) * step.span.key_tile * v.shape[3]
    run(loops.mix, work, values, step.span._replace(starts=starts), scores.weights, choice.kept, parts)
    held, _, free, top = choice.sums.T
    total = np.maximum(held + free, np.finfo(np.float32).tiny)  # 0 where no key is seen
    output = ((parts * choice.rescale[..., None]).sum(1) / total[:, None]).astype(np.float32)
    with np.errstate(divide="ignore"):
        lse = ((top + np.log2(held)) * math.log(2)).astype(np.float32)
    return torch.from_numpy(output).view(*heads, 1, -1).to(v.dtype), torch.from_numpy(lse).view(*heads, 1)


def _tile_map(kept: Bytes, step: Step, heads: Sequence[int], config: AATConfig) -> TileMap:
    """`kept` as one query tile; numpy, because a row of a long cache is enough for torch to wake its threads."""
    states = np.where(step.seen == step.sizes, FULL, np.where(step.seen > 0, PARTIAL, NONE)).astype(np.uint8)
    row, column = np.nonzero(kept)
    start = np.searchsorted(row, np.arange(len(kept) + 1))
    return TileMap(
        row_start=torch.from_numpy(start),
        columns=torch.from_numpy(column),
        levels=torch.full((len(row),), EXACT, dtype=torch.uint8),
        cut=torch.from_numpy(states[row // heads[1], column] == PARTIAL),
        states=torch.from_numpy(states)[:, None, None],
        shape=(heads[0], heads[1], 1, states.shape[1]),
        query_tile=config.query_tile,
        key_tile=config.key_tile,
    )
