"""Metrics for `evaluate`, loaded from this package without a network: aat_density, aat_infidelity, long_perplexity.

metric = load_metric("aat_density")
metric.compute(predictions=texts, model=model, tokenizer=tokenizer, tolerance=0.05)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aat_hf.data.sources import optional_module

METRICS = ("aat_density", "aat_infidelity", "long_perplexity")


def metric_path(name: str) -> str:
    """The folder of a metric, for `evaluate.load`.

    Raises:
        ValueError: No such metric.
    """
    if name not in METRICS:
        raise ValueError(f"no metric {name!r}: choose one of {', '.join(METRICS)}")
    return str(Path(__file__).parent / name)


def load_metric(name: str) -> Any:
    """`evaluate.load` of one of `METRICS`.

    Raises:
        ValueError: No such metric.
        ImportError: `evaluate` is not installed.
    """
    return optional_module("evaluate").load(metric_path(name))
