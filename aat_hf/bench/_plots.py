"""A benchmark's lines as one picture: `--plot FILE`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aat_hf.data.progress import notice
from aat_hf.data.sources import optional_module

Lines = Mapping[str, Sequence[tuple[float, float]]]
"""Points (x, y) by the name of their line."""


def add_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare `--plot`."""
    parser.add_argument("--plot", type=Path, metavar="FILE", help=f"draw {what} (PNG, PDF or SVG; needs matplotlib)")


def check(args: argparse.Namespace) -> None:
    """Refuse `--plot` before the work when it cannot be done after it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if args.plot is not None:
        optional_module("matplotlib", "viz")


def draw(
    path: Path, lines: Lines, x: str, y: str, *, log_x: bool = False, log_y: bool = False, level: float | None = None
) -> None:
    """Write a picture of `lines`, with the axes named `x` and `y` and a grey line at the `level` of y."""
    figure = optional_module("matplotlib.figure", "viz").Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if level is not None:
        axes.axhline(level, color="0.6", linewidth=1)
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    log_y = log_y and any(value > 0 for points in lines.values() for _, value in points)
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear", yscale="log" if log_y else "linear")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a Matplotlib figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    notice(f"Wrote {path}")


def grouped(points: Sequence[tuple[str, float, float]]) -> dict[str, list[tuple[float, float]]]:
    """`Lines` of (name, x, y)."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, x, y in points:
        lines.setdefault(name, []).append((x, y))
    return lines
