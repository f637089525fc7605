"""The picture of `aat bench selection`: divergence against density, a panel for each scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

from aat_hf.bench import _plots
from aat_hf.data.sources import optional_module

Points = Mapping[str, Sequence[tuple[float, float]]]
"""(density, KL) by method, for each of its tolerances."""


def draw_frontier(path: Path, panels: Mapping[str, Points]) -> None:
    """Write a picture (PNG, PDF or SVG) of the panels, by title; a method looks alike in all of them."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = optional_module("matplotlib.figure", "viz").Figure(
        figsize=(4.6 * columns + 2.6, 3.8 * rows), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    looks = _looks([method for points in panels.values() for method in points])
    for axes, (title, methods) in zip(grid, panels.items(), strict=False):
        _panel(axes, title, methods, looks)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    known = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(known.values(), known.keys(), fontsize=7, loc="outside right upper")
    _plots.save(figure, path)


def _panel(axes: Any, title: str, methods: Points, looks: Mapping[str, Any]) -> None:
    for method, points in methods.items():
        axes.plot(*zip(*sorted(points), strict=True), label=method, markersize=5, linewidth=1, **looks[method])
    if any(kl > 0 for points in methods.values() for _, kl in points):
        axes.set_yscale("log")
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="density", ylabel="KL(dense ‖ aat), nats per token")
    axes.grid(alpha=0.3, which="both")


def _looks(methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """A marker and a colour for each method: ten colours, then the next marker."""
    pairs = cycle(product("os^Dv", (f"C{number}" for number in range(10))))
    named = zip(dict.fromkeys(methods), pairs, strict=False)
    return {method: dict(marker=marker, color=color) for method, (marker, color) in named}
