"""What the metrics compute: a causal language model reads texts, and its attention is watched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import aat_hf
from aat_hf.compare import ComparisonError, run_pass
from aat_hf.evaluation.predictions import token_nll


def density(
    texts: Sequence[str], model: Any, tokenizer: Any, tolerance: float | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Share of the attention's tiles that are computed.

    Args:
        texts: Read one by one.
        model: A causal language model; it is left as it was.
        tokenizer: Its tokenizer.
        tolerance: In place of the model's own.
        max_tokens: Read so many tokens of each text.

    Returns:
        `density` over all layers, heads and texts, `density_p10` and `density_p90` over heads, and `tiled`, the share
        of the attention calls that were tiled.
    """
    report = _report(texts, model, tokenizer, tolerance, max_tokens)
    heads = torch.cat([record.density for record in report.layers])
    low, high = heads.quantile(torch.tensor([0.1, 0.9])).tolist()
    calls = {path: sum(r.calls for r in report.layers if r.path == path) for path in {r.path for r in report.layers}}
    tiled = 1 - calls.get("dense", 0) / sum(calls.values())
    return {"density": report.density, "density_p10": low, "density_p90": high, "tiled": tiled}


def infidelity(
    texts: Sequence[str], model: Any, tokenizer: Any, tolerance: float | None = None, max_tokens: int | None = None
) -> dict[str, Any]:
    """Attention probability that tiling loses, measured on random rows.

    Args:
        texts, model, tokenizer, tolerance, max_tokens: As of `density`.

    Returns:
        `infidelity` of the tiled calls and the half width of its 95 % interval, `heads_over_tolerance`, the share of
        tiled heads whose own interval lies above the tolerance, and the `tolerance`. The first three are None when
        nothing was tiled: such attention is exact.
    """
    with _settings(model, tolerance) as settings:
        report = _report(texts, model, tokenizer, None, max_tokens)
    mean, width = report.infidelity
    lows = [
        r.infidelity_mean - r.infidelity_half_width
        for r in report.layers
        if r.infidelity_mean is not None and r.infidelity_half_width is not None
    ]
    over = float((torch.cat(lows) > settings.tolerance).float().mean()) if lows else None
    return {
        "infidelity": mean if math.isfinite(mean) else None,
        "half_width": width if math.isfinite(width) else None,
        "heads_over_tolerance": over,
        "tolerance": settings.tolerance,
    }


def perplexity(
    texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    tolerance: float | None = None,
    max_tokens: int | None = None,
    implementation: str = "aat",
    buckets: int = 4,
) -> dict[str, Any]:
    """Perplexity of long texts, each read whole, over all tokens and by position.

    Args:
        texts, model, tokenizer, tolerance, max_tokens: As of `density`.
        implementation: Attention implementation, such as "aat" or "sdpa".
        buckets: How many ranges of positions, about equal in each text.

    Returns:
        `perplexity` over the tokens of all texts, `by_position` (a list of `buckets` perplexities from the beginnings
        to the ends of the texts), and `tokens`, how many were predicted.
    """
    parts: list[list[Tensor]] = [[] for _ in range(buckets)]
    with _settings(model, tolerance):
        for ids in _encoded(texts, model, tokenizer, max_tokens):
            losses = token_nll(model, ids, run_pass(model, ids, implementation).hidden)
            for part, losses_of_part in zip(parts, losses.tensor_split(buckets), strict=True):
                part.append(losses_of_part)
    every = torch.cat([losses for part in parts for losses in part])
    ranges = [torch.cat(part) for part in parts]
    return {
        "perplexity": float(every.mean().exp()),
        "by_position": [float(losses.mean().exp()) for losses in ranges if losses.numel()],
        "tokens": every.numel(),
    }


def _report(
    texts: Sequence[str], model: Any, tokenizer: Any, tolerance: float | None, max_tokens: int | None
) -> aat_hf.Report:
    with _settings(model, tolerance), aat_hf.record(model) as report:
        for ids in _encoded(texts, model, tokenizer, max_tokens):
            run_pass(model, ids, "aat")
    return report


def _encoded(texts: Sequence[str], model: Any, tokenizer: Any, max_tokens: int | None) -> Iterator[Tensor]:
    """Token ids of each text, (1, tokens)."""
    for number, text in enumerate(texts):
        ids = tokenizer(text, verbose=False).input_ids[:max_tokens]
        if len(ids) < 2:
            raise ComparisonError(f"text {number} has {len(ids)} tokens: two at least are needed to predict one")
        yield torch.tensor([ids], device=model.device)


@contextmanager
def _settings(model: Any, tolerance: float | None) -> Iterator[aat_hf.AATConfig]:
    """The settings in force, with another tolerance if one is given; afterwards the model is as before."""
    before, implementation = aat_hf.configure(model), model.config._attn_implementation
    try:
        yield before if tolerance is None else aat_hf.configure(model, tolerance=tolerance)
    finally:
        aat_hf.configure(model, **before.to_dict())
        model.set_attn_implementation(implementation)
