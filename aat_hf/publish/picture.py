"""The picture of a training's losses."""

from __future__ import annotations

from pathlib import Path

from aat_hf.data.sources import optional_module
from aat_hf.publish.training import Training

PICTURE = "training.png"


def draw_losses(aat: Training, dense: Training | None, path: Path) -> None:
    """Training loss by step; with a dense twin both, and how they differ.

    Raises:
        ImportError: matplotlib is not installed.
    """
    panels = 1 if dense is None else 2
    figure = optional_module("matplotlib.figure", "viz").Figure(figsize=(5 * panels, 3.6), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    losses = aat.losses()
    if dense is not None:
        twin = dense.losses()
        axes[0].plot(list(twin), list(twin.values()), "k-", label="dense (SDPA)")
        axes[1].plot(list(losses), [losses[step] - twin[step] for step in losses], ".-")
        axes[1].axhline(0, color="k", lw=0.8)
        axes[1].set(title="aat minus dense", xlabel="step", ylabel="nats per token")
    axes[0].plot(list(losses), list(losses.values()), "C0--", label="aat")
    axes[0].set(title="training loss", xlabel="step", ylabel="nats per token")
    axes[0].legend()
    figure.savefig(path, dpi=110)
