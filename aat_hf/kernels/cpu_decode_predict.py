"""Which tiles of a long cache one query reads, by summaries of the tiles: neither keys nor values of the others."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from aat_hf.config import AATConfig
from aat_hf.kernels import cpu_decode_loops as loops
from aat_hf.kernels.cpu_decode_inputs import FROM_MEMORY, Step, chosen
from aat_hf.kernels.cpu_matrices import Bytes, Floats
from aat_hf.kernels.cpu_threads import run
from aat_hf.tiling.summaries import TileSummaries

_BLOCK = 512  # tiles of a work item


def opened_tiles(
    step: Step, k: Tensor, config: AATConfig, sinks: Tensor | None, summaries: TileSummaries
) -> Bytes | None:
    """The tiles whose keys are read: those without which a head is predicted to lose its tolerance, over its margin.

    The first and the last tiles that the query sees, and those that the mask cuts, are scored exactly and always read.
    A tile that one head reads is read for all heads of its group.

    Args:
        k: (batch, kv_heads, keys, head_dim), of which `step` was made.

    Returns:
        (batch * kv_heads, at least key_tiles) 1 for tiles that are read; None if a predicted mass is not finite, or
        if more than `max_kept` of the tiles were read.
    """
    mass, top, kinds = predicted_masses(step, k, config, summaries)
    if np.isnan(top).any():
        return None
    tolerances = np.minimum(config.tolerance * np.exp(-summaries.margins.log), 1.0)
    kept = chosen(mass, top, sinks, kinds.shape[1], tolerances, config.max_kept).kept
    opened = kept.reshape(len(step.span.starts), -1, kept.shape[1]).max(1)
    opened[:, : kinds.shape[1]] |= (kinds == loops.SCORED).repeat(step.span.kv_heads, 0)
    seen = np.count_nonzero(step.seen) * step.span.kv_heads
    return None if opened.sum() > config.max_kept * seen else opened


def predicted_masses(
    step: Step, k: Tensor, config: AATConfig, summaries: TileSummaries
) -> tuple[Floats, Floats, Bytes]:  # fmt: skip
    """Masses of all tiles, and what they come from; arguments as of `opened_tiles`.

    Returns:
        mass (batch * heads, blocks * tiles of a block), over 2^top; top (batch * heads, blocks), NaN where a mass is
        not finite; kinds (batch, key_tiles), UNSEEN, SUMMARISED or SCORED.
    """
    means, variances, complete = summaries.of(k, config.key_tile)
    known = *(x.reshape(-1, *x.shape[2:]) for x in (means, variances)), complete
    kinds = _kinds(step, config, complete)
    blocks = -(-kinds.shape[1] // _BLOCK)
    mass, top = (np.empty((len(step.rows), size), np.float32) for size in (blocks * _BLOCK, blocks))
    work = FROM_MEMORY * 2 * len(step.span.starts) * complete * k.shape[3]
    run(loops.predict, work, step.rows, step.keys, *known, kinds, step.span, step.rule, mass, top)
    return mass, top, kinds


def _kinds(step: Step, config: AATConfig, complete: int) -> Bytes:
    """The kind of each tile: (batch, key_tiles)."""
    alive = step.seen > 0
    count = alive.cumsum(1)
    near = (count <= config.sink_tiles) | (count[:, -1:] - count <= config.local_tiles)
    near |= step.seen < step.sizes
    near[:, complete:] = True
    return np.where(alive, np.where(near, loops.SCORED, loops.SUMMARISED), loops.UNSEEN).astype(np.uint8)
