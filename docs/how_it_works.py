"""The picture and the numbers of docs/how-it-works.md, from SmolLM2-135M: python docs/how_it_works.py.

Needs matplotlib ("aat-hf[viz]") and, once, the network for the model. Takes about a minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from aat_hf import AATConfig
from aat_hf.bench._common import environment, load, look_at_layers, tokens_of
from aat_hf.tiling.layout import forced_tiles
from aat_hf.tiling.plan import plan
from aat_hf.tiling.select import Scene
from aat_hf.tiling.selectors import SELECTORS

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import ListedColormap

LEVELS = ("culled", "exact, chosen", "exact, always")
COLOURS = ("0.75", "C0", "C1")


def main(argv: Sequence[str] | None = None) -> None:
    """Draw, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--head", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--query-tile", type=int, default=56, help="whose choice is shown")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("images") / "how_it_works.png")
    args = parser.parse_args(argv)
    torch.manual_seed(0)  # of the principal axes
    model, tokenizer = load("smollm2")
    calls: list[tuple[Any, ...]] = []

    def look(layer: int, *call: Any) -> None:
        if layer == args.layer:
            calls.append(call)

    look_at_layers(model, tokens_of(model, tokenizer, "code", args.tokens), look)
    q, k, _, mask, scale = calls[0]
    scene = Scene.of(q, k, mask, scale, AATConfig())
    tile_map = plan(scene).tile_map
    assert tile_map is not None
    levels = tile_map.exact[0, args.head].long() + (forced_tiles(mask, scene.states, scene.config)[0, 0]).long()
    levels = levels.masked_fill(scene.states[0, 0] == 0, -1)
    keys = k[0, args.head * k.shape[1] // q.shape[1]]
    mine = q[0, args.head, args.query_tile * 64 : (args.query_tile + 1) * 64]
    estimate, exact = (SELECTORS[name](scene)[0, args.head, args.query_tile] for name in ("mix", "oracle"))
    canvas, axes = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    draw_keys(axes[0], keys, mine, levels[args.query_tile])
    draw_map(axes[1], levels, args.query_tile)
    draw_masses(axes[2], estimate, exact, levels[args.query_tile])
    canvas.savefig(args.out, dpi=150)
    print(f"layer {args.layer}, head {args.head}, {args.tokens} tokens of code; {environment()}")
    print(f"density {float(tile_map.density[0, args.head]):.3f}, of the layer {float(tile_map.density.mean()):.3f}")
    row = levels[args.query_tile]
    for level, name in enumerate(LEVELS):
        print(f"query tile {args.query_tile}: {name}: {int((row == level).sum())} tiles of 16 keys, "
              f"exact probability {float(exact[row == level].sum()):.4f}")  # fmt: skip
    print(f"wrote {args.out}")


def draw_keys(axes: Any, keys: Tensor, queries: Tensor, levels: Tensor) -> None:
    """Keys on their two principal axes, coloured by the level of their tile; the mean query's direction."""
    level = levels.repeat_interleave(16)[: len(keys)]
    centre = keys.mean(0)
    directions = torch.pca_lowrank(keys - centre, 2)[2]
    flat = (keys - centre) @ directions
    for value, (name, colour) in enumerate(zip(LEVELS, COLOURS, strict=True)):
        axes.scatter(*flat[level == value].T, s=3, color=colour, label=name)
    arrow = queries.mean(0) @ directions
    arrow = arrow / arrow.norm() * flat.norm(dim=-1).quantile(0.9)
    axes.annotate("", xy=tuple(arrow.tolist()), xytext=(0, 0), arrowprops={"arrowstyle": "->"})
    axes.text(*(arrow / 2).tolist(), "mean query", ha="center", va="bottom")
    axes.set(title="keys of one head", xlabel="first principal axis", ylabel="second")
    axes.legend(markerscale=4, fontsize=8)


def draw_map(axes: Any, levels: Tensor, query_tile: int) -> None:
    """The tile map of the head, the query tile of the other panels marked."""
    colours = ListedColormap(["white", *COLOURS])
    axes.imshow(levels, cmap=colours, vmin=-1, vmax=2, aspect="auto", interpolation="nearest")
    axes.axhline(query_tile, color="k", lw=0.8)
    axes.set(title="its tile map", xlabel="key tile (16 keys)", ylabel="query tile (64 rows)")


def draw_masses(axes: Any, estimate: Tensor, exact: Tensor, levels: Tensor) -> None:
    """Estimated against exact probability of every tile that the query tile sees."""
    for value, colour in enumerate(COLOURS):
        chosen = levels == value
        axes.scatter(exact[chosen].clamp(min=1e-7), estimate[chosen].clamp(min=1e-7), s=6, color=colour)
    axes.plot([1e-6, 1], [1e-6, 1], "k-", lw=0.8)
    axes.set(title="probability of its tiles", xlabel="exact", ylabel="estimated", xscale="log", yscale="log")


if __name__ == "__main__":
    main()
