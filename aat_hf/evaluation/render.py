"""An evaluation as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aat_hf.bench._common import markdown_table
from aat_hf.data.sources import optional_module
from aat_hf.evaluation.generation import TaskResult
from aat_hf.evaluation.predictions import PredictionResult


def by_tolerance(results: Sequence[PredictionResult]) -> dict[float, list[PredictionResult]]:
    """The results of each tolerance: first that of all positions, then the ranges in order."""
    grouped: dict[float, list[PredictionResult]] = {}
    for one in results:
        grouped.setdefault(one.tolerance, []).append(one)
    return grouped


def prediction_tables(results: Sequence[PredictionResult]) -> str:
    """All positions by tolerance, then perplexity by position."""
    grouped = by_tolerance(results)
    head = ("tolerance", "density", "lost (audited)", "ΔNLL", "KL", "KL p99", "top-1")
    whole = [
        [f"{r.tolerance:g}", f"{r.density:.3f}", _number(r.lost), f"{r.nll_aat - r.nll_dense:+.4f}", f"{r.kl:.4f}",
         f"{r.kl_p99:.3f}", f"{r.top1_agreement:.3f}"]
        for r, *_ in grouped.values()
    ]  # fmt: skip
    columns = ["perplexity at", "dense", *(f"aat {tolerance:g}" for tolerance in grouped)]
    rows = []
    for same_range in zip(*(ranges[1:] for ranges in grouped.values()), strict=True):
        first = same_range[0]
        perplexities = [first.nll_dense, *(r.nll_aat for r in same_range)]
        rows.append([f"{first.first}–{first.last}", *(f"{math.exp(nll):.2f}" for nll in perplexities)])
    return f"{markdown_table(head, whole)}\n\n{markdown_table(columns, rows)}"


def task_table(results: Sequence[TaskResult]) -> str:
    """One line for each task and tolerance."""
    head = ("task", "attention", "tokens", "score", "same as dense", "density", "lost (audited)")
    return markdown_table(
        head,
        [
            [r.task, _attention(r), f"{r.tokens:.0f}", f"{r.score:.3f}", f"{r.same_as_dense:.2f}", f"{r.density:.3f}",
             _number(r.lost)]
            for r in results
        ],
    )  # fmt: skip


def draw(predictions: Sequence[PredictionResult], tasks: Sequence[TaskResult], path: Path) -> None:
    """Perplexity and KL by position, and the tasks' scores, as one picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = 2 * bool(predictions) + bool(tasks)
    figure = optional_module("matplotlib.figure", "viz").Figure(figsize=(5 * panels, 4.2), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    if predictions:
        _draw_positions(axes[0], axes[1], by_tolerance(predictions))
    if tasks:
        _draw_tasks(axes[-1], tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_positions(perplexity: Any, divergence: Any, grouped: dict[float, list[PredictionResult]]) -> None:
    for number, (tolerance, (_, *ranges)) in enumerate(grouped.items()):
        middles = [(r.first + r.last) / 2 for r in ranges]
        if number == 0:
            perplexity.plot(middles, [math.exp(r.nll_dense) for r in ranges], "k.-", label="dense")
        perplexity.plot(middles, [math.exp(r.nll_aat) for r in ranges], ".--", label=f"aat {tolerance:g}")
        divergence.plot(middles, [r.kl for r in ranges], ".-", color=f"C{number}", label=f"aat {tolerance:g}")
    perplexity.set(title="Perplexity by position", xlabel="position, tokens")
    divergence.set(title="KL(dense ‖ aat) by position", xlabel="position, tokens", ylabel="nats")
    for axes in (perplexity, divergence):
        axes.legend()


def _draw_tasks(axes: Any, results: Sequence[TaskResult]) -> None:
    names = list(dict.fromkeys(r.task for r in results))
    kinds = list(dict.fromkeys(_attention(r) for r in results))
    width = 0.8 / len(kinds)
    for number, kind in enumerate(kinds):
        heights = [r.score for r in results if _attention(r) == kind]
        places = [place + (number - (len(kinds) - 1) / 2) * width for place in range(len(names))]
        axes.bar(places, heights, width, label=kind, color="k" if kind == "dense" else f"C{number - 1}")
    axes.set_xticks(range(len(names)), names)
    axes.set(title="Tasks: share of the answers given", ylim=(0, 1.05))
    axes.legend()


def _attention(result: TaskResult) -> str:
    return "dense" if result.tolerance is None else f"aat {result.tolerance:g}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"
