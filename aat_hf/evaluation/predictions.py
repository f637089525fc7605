"""What a tolerance does to next-token predictions, by position in the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import aat_hf
from aat_hf.compare import ComparisonError, Quality, head_logits, quality, run_pass
from aat_hf.data.progress import progress


@dataclass(frozen=True)
class PredictionResult:
    """One tolerance against dense attention over one range of positions.

    Attributes:
        tolerance: Of the tiled pass.
        first: First position whose next token is predicted.
        last: Last one.
        density: Share of the tiles computed, over the whole text.
        lost: Audited infidelity over the whole text; NaN when nothing was tiled.
        nll_dense: Negative log-likelihood with dense attention, nats per token.
        nll_aat: The same, tiled.
        kl: KL(dense ‖ aat) of the predictions, nats, mean.
        kl_p99: Its 99th percentile.
        top1_agreement: Share of positions where both name the same most likely token.
    """

    tolerance: float
    first: int
    last: int
    density: float
    lost: float
    nll_dense: float
    nll_aat: float
    kl: float
    kl_p99: float
    top1_agreement: float


def evaluate_predictions(
    model: Any, input_ids: Tensor, settings: Sequence[aat_hf.AATConfig], buckets: int
) -> list[PredictionResult]:
    """For every settings one result over all positions, then one for each of `buckets` ranges.

    Args:
        model: A causal language model; its settings are changed.
        input_ids: The text, (1, tokens).
        settings: One tiled pass for each.
        buckets: How many ranges of positions, about equal.

    Raises:
        ComparisonError: The text is too short for so many ranges.
    """
    last = input_ids.shape[1] - 1
    edges = [round(last * part / buckets) for part in range(buckets + 1)]
    if last < buckets:
        raise ComparisonError(f"{last} predictions cannot be split into {buckets} ranges: give a longer text")
    results = []
    with progress(f"Predictions over {last + 1} tokens", len(settings) + 1) as update:
        dense = run_pass(model, input_ids, "sdpa").hidden
        update(1)
        for number, one in enumerate(settings, start=2):
            aat_hf.configure(model, **one.to_dict())
            with aat_hf.record(model) as report:
                tiled = run_pass(model, input_ids, "aat").hidden
            for first, end in [(0, last), *pairwise(edges)]:
                rows = slice(first, end + 1)
                found = quality(model, input_ids[:, rows], dense[rows], tiled[rows])
                results.append(_result(one.tolerance, first, end - 1, report, found))
            update(number)
    return results


def _result(tolerance: float, first: int, last: int, report: aat_hf.Report, found: Quality) -> PredictionResult:
    return PredictionResult(
        tolerance, first, last, report.density, report.infidelity[0], found.nll_dense, found.nll_aat, found.kl,
        found.kl_p99, found.top1_agreement,
    )  # fmt: skip


@torch.inference_mode()
def token_nll(model: Any, input_ids: Tensor, hidden: Tensor, chunk: int = 256) -> Tensor:
    """Negative log-likelihood of each token after the first, nats: (tokens - 1,).

    Args:
        model: A causal language model.
        input_ids: The text, (1, tokens).
        hidden: Its last hidden states, (tokens, hidden).
        chunk: Positions whose logits are in memory at a time.
    """
    parts = [
        torch.nn.functional.cross_entropy(head_logits(model, states), targets, reduction="none")
        for states, targets in zip(hidden[:-1].split(chunk), input_ids[0, 1:].split(chunk), strict=True)
    ]
    return torch.cat(parts)
