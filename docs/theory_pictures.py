"""The pictures and numbers of docs/theory.md, from SmolLM2-135M: python docs/theory_pictures.py.

Needs matplotlib ("aat-hf[viz]"), SciPy and, once, the network for the model and the text. Takes a few minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from theory_layers import TOKENS, Layers, layers_of, read_layers
from theory_patterns import pattern_numbers
from torch import Tensor

from aat_hf.bench._common import environment, load, tokens_of
from aat_hf.crystal import cohomology, gauge, lattice, periodic, refraction, scales
from aat_hf.crystal.complexes import components
from aat_hf.geometry import fisher
from aat_hf.geometry.lift import lift
from aat_hf.geometry.tile_graph import ollivier, tile_graph
from aat_hf.quantum import entropy, fidelity, measurement, operators, path_integral, states

matplotlib.use("Agg")
from matplotlib import pyplot

TILE = 64
FIT_TOKENS = 512  # of the decomposition of scores, whose cost grows with the square


def figure(panels: int, height: float = 2.9) -> tuple[Any, list[Any]]:
    """A row of panels."""
    canvas, axes = pyplot.subplots(1, panels, figsize=(9, height), layout="constrained", squeeze=False)
    return canvas, list(axes[0])


def states_and_fidelity(layers: Layers) -> Any:
    """Output error and its bound against the mass a row loses."""
    layer, head = layers[10], 4
    psi = states.from_probabilities(layer.attention(head)[TOKENS // 2 :])
    mass = measurement.tile_probabilities(psi, TILE)
    order = mass.argsort(-1, descending=True)
    canvas, (left, right) = figure(2)
    for share, colour in ((0.125, "C3"), (0.25, "C1"), (0.5, "C0")):
        kept = torch.zeros_like(mass, dtype=torch.bool).scatter(-1, order[:, : int(share * mass.shape[-1])], True)
        after = measurement.project_tiles(psi, kept.repeat_interleave(TILE, -1))[1]
        lost = fidelity.infidelity(psi, after)
        error = ((after.square() - psi.square()) @ layer.values(head).double()).norm(dim=-1)
        values = layer.values(head).double()
        left.scatter(lost, error / torch.pdist(values).max(), 3, colour, label=f"{share:.1%} of the tiles kept")
        right.scatter(lost, fisher.distance(psi.square(), after.square()), 3, colour)
        direct = (mass * ~kept).sum(-1)
        print(f"states: {share:.1%} of tiles, lost mass {direct.mean():.4f}, infidelity {lost.mean():.4f}, "
              f"largest difference {(direct - lost).abs().max():.1e}")  # fmt: skip
    line = torch.linspace(0, 0.5, 200)
    left.plot([0, 0.5], [0, 0.5], "k-", lw=1, label="bound: lost mass × diameter")
    right.plot(line, 2 * line.sqrt().asin(), "k--", lw=1, zorder=3, label="2 arcsin √(lost mass)")
    left.set(xlabel="lost mass = infidelity", ylabel="output error / diameter of values", xlim=(0, 0.5), ylim=(0, 0.2))
    right.set(xlabel="lost mass = infidelity", ylabel="Fisher–Rao distance, rad", xlim=(0, 0.5), ylim=(0, 1.75))
    left.legend(fontsize=7)
    right.legend(fontsize=7)
    return canvas


def entropies(layers: Layers) -> Any:
    """Effective rank of every head, and the two costs of coarse graining."""
    rank, rows, keys = [], [], []
    sizes = (4, 8, 16, 32, 64, 128)
    for layer in layers.values():
        a = torch.stack([layer.attention(h, FIT_TOKENS) for h in range(len(layer.q))])
        rank.append(entropy.head_entropy(a).exp())
        defects = [operators.coarse_graining(a, t) for t in sizes]
        wholes = [[operators.tile_average(x, t).square().sum((-2, -1)) for t in sizes] for x in (a.mT, a)]
        rows.append(torch.stack([d.queries / whole for d, whole in zip(defects, wholes[0], strict=True)], -1))
        keys.append(torch.stack([d.keys / whole for d, whole in zip(defects, wholes[1], strict=True)], -1))
        print(f"commutators: mean over pairs of heads {operators.noncommutativity(a).sum() / 72:.3f}")
    canvas, (left, right) = figure(2)
    picture = left.imshow(torch.stack(rank), aspect="auto", cmap="viridis")
    left.set(xlabel="head", ylabel="layer", title="effective rank of 512 rows")
    left.set_yticks(range(len(layers)), [str(i) for i in layers])
    canvas.colorbar(picture, ax=left)
    for name, defect in (("queries of a tile share a map", rows), ("keys of a tile share a weight", keys)):
        lost = torch.stack(defect).mean((0, 1))
        right.plot(sizes, lost, "o-", ms=3, label=name)
        print(f"coarse graining, {name}: {lost[4]:.2f} lost by tiles of {sizes[4]}")
    right.set(
        xscale="log",
        xlabel="tile size",
        ylabel="share of the averaged map lost",
        ylim=(0, None),
        title="cost of coarse graining",
    )
    right.set_xticks(sizes, [str(t) for t in sizes])
    right.minorticks_off()
    right.legend(fontsize=7)
    r = torch.stack(rank)
    print(
        f"effective rank: smallest {r.min():.1f}, median {r.median():.0f}, largest {r.max():.0f} of {FIT_TOKENS} rows"
    )
    return canvas


def fisher_length(layers: Layers) -> Any:
    """The index along the keys, and tiles of equal information."""
    layer, head, start, end = layers[10], 4, 1024, 1280
    index = refraction.index_field(layer.keys(head), refraction.query_moment(layer.q[head], layer.scale))
    window = index[start:end]
    cuts = refraction.whole_boundaries(refraction.equal_information_boundaries(window, 16), end - start)
    canvas, (axis,) = figure(1)
    axis.plot(range(start, end), window, lw=0.8)
    axis.vlines(cuts + start, 0, float(window.max()), "C3", lw=0.8, label="16 tiles of equal information")
    axis.set(xlabel="key", ylabel="index, nats per token", ylim=(0, None), xlim=(start, end))
    axis.legend(fontsize=7, loc="upper right")
    path = refraction.optical_path(window)
    uniform = path[torch.arange(0, end - start + 1, 16)].diff()
    print(f"Fisher length of all {TOKENS} keys {index.sum():.0f} nats, of the window {path[-1]:.0f}; tiles of 16 to "
          f"hold {uniform.min():.0f} to {uniform.max():.0f} nats, equal tiles are {cuts.diff().min()} to "
          f"{cuts.diff().max()} keys long")  # fmt: skip
    return canvas


def scale_pictures(layers: Layers) -> Any:
    """Mass by octave of distance, and the spread of keys by tile size."""
    no_sink = (torch.arange(TOKENS) > 0).double()
    masses = torch.stack([scales.octave_mass(layers[i].attention(h) * no_sink) for i in layers for h in range(9)])
    canvas, (left, right) = figure(2, 3.4)
    picture = left.imshow(masses, aspect="auto", cmap="magma", vmin=0, vmax=0.25)
    octaves = ["0", "1", *(f"{2**i}–" for i in range(1, masses.shape[1] - 1))]
    left.set_xticks(range(len(octaves)), octaves, rotation=60, fontsize=7)
    left.set_yticks(range(4, 54, 9), [f"layer {i}" for i in layers], fontsize=7)
    left.hlines([8.5 + 9 * i for i in range(5)], -0.5, masses.shape[1] - 0.5, "w", lw=0.5)
    left.set(xlabel="distance, keys", title="attention by distance, without the first key")
    canvas.colorbar(picture, ax=left)
    sizes = [2**i for i in range(1, 11)]
    for i, layer in layers.items():
        spread = scales.tile_variance(layer.k, sizes)
        share = (spread / scales.tile_variance(layer.k, [TOKENS])).mean(0)
        right.plot(sizes, share, "o-", ms=3, label=f"layer {i}")
        exponent = scales.scaling_exponent(spread[:, 3:7], sizes[3:7])
        print(f"scales: layer {i}, keys inside tiles of 16 hold {share[3]:.2f} of the variance, of 64 {share[5]:.2f}; "
              f"exponent from 16 to 128 {exponent.mean():.2f}")  # fmt: skip
    right.set(xscale="log", xlabel="tile size", ylabel="spread inside a tile / whole", ylim=(0, 1))
    right.set_xticks(sizes, [str(s) for s in sizes], fontsize=7)
    right.minorticks_off()
    right.legend(fontsize=7)
    return canvas


def graph_pictures(mixed: Layers) -> Any:
    """Curvature of the tile graph of two texts one after the other; its scale cohomology is printed."""
    mass = torch.stack([path_integral.tile_transfer(mixed[10].attention(h), TILE) for h in range(9)]).mean(0)
    mass = mass[1:, 1:]  # without the first tile: the sink joins everything
    affinity = tile_graph(mass, float(mass[mass > 0].quantile(0.6)) / 2)
    curvature = ollivier(affinity)
    edge = affinity > 0
    canvas, (left, right) = figure(2, 3.4)
    left.imshow(mass, cmap="magma", vmax=float(mass.quantile(0.95)))
    left.set(title="mass of tiles, code then prose", xlabel="key tile", ylabel="query tile")
    shown = right.imshow(curvature.masked_fill(~edge, torch.nan), cmap="coolwarm", vmin=-0.6, vmax=0.6)
    right.set(title="curvature of edges", xlabel="tile")
    canvas.colorbar(shown, ax=right)
    spaces = cohomology.tower(edge, 4)
    for k in (0, 1):
        print(f"scale cohomology: ranks r_{k} {cohomology.scale_ranks(spaces, k).tolist()}")
    half = torch.arange(1, len(edge) + 1) < TOKENS // TILE // 2
    inside, across = edge & (half[:, None] == half), edge & (half[:, None] != half)
    print(f"tile graph: {len(components(edge).unique())} components, {int(edge.sum()) // 2} edges; mean curvature "
          f"inside the texts {curvature[inside].mean():.2f}, across {curvature[across].mean():.2f} "
          f"({int(across.sum()) // 2} edges)")  # fmt: skip
    return canvas


def detrended(profile: Tensor) -> Tensor:
    """A profile without its linear trend, which scores do not fix."""
    x = torch.arange(len(profile)).double()
    basis = torch.linalg.qr(torch.stack([torch.ones_like(x), x], -1)).Q
    return profile.double() - basis @ (basis.mT @ profile.double())


def slash_pictures(layers: Layers, frequencies: Tensor, factor: float) -> Any:
    """Measured slash profiles beside those that mean query, mean key and the frequencies predict."""
    offsets = torch.arange(FIT_TOKENS // 2)
    weight = torch.ones(FIT_TOKENS, FIT_TOKENS).tril()
    found: list[tuple[float, str, Tensor, Tensor]] = []
    for i, layer in layers.items():
        heads = torch.stack([layer.scores(h, FIT_TOKENS) for h in range(9)])
        measured = gauge.fit_scores(heads, weight, steps=40).offset[:, FIT_TOKENS - 1 :][:, : len(offsets)]
        for h in range(9):
            q, k = layer.q[h, :FIT_TOKENS].double(), layer.keys(h)[:FIT_TOKENS].double()
            predicted = lattice.slash_profile(q, k, frequencies, offsets, layer.scale, factor)
            a, b = detrended(measured[h]), detrended(predicted)
            found.append((float((a * b).sum() / (a.norm() * b.norm())), f"layer {i}, head {h}", a, b))
    found.sort(key=lambda entry: entry[0])
    quantiles = torch.tensor([entry[0] for entry in found]).quantile(torch.tensor([0.25, 0.5]))
    strong = torch.tensor([value for value, _, a, _ in found if a.std() > 1])
    print(f"slash: correlation median {quantiles[1]:.3f}, lower quartile {quantiles[0]:.3f}, worst {found[0][0]:.2f} "
          f"({found[0][1]}) over {len(found)} heads; median {strong.median():.3f} over the {len(strong)} heads whose "
          f"slashes vary by more than a nat")  # fmt: skip
    canvas, axes = figure(3)
    for axis, (value, name, a, b) in zip(axes, (found[-1], found[len(found) // 2], found[0]), strict=True):
        axis.plot(offsets, a, lw=1, label="measured (least squares)")
        axis.plot(offsets, b, "--", lw=1, label="predicted from means")
        axis.set(title=f"{name}: {value:.3f}", xlabel="query − key, tokens")
    axes[0].set(ylabel="nats, trend removed")
    axes[0].legend(fontsize=7)
    return canvas


def structure_pictures(table: Layers, prose: Layers) -> Any:
    """Structure factor of the keys that heads keep in a table and in prose."""
    n, first = 1024, 128  # the beginning, with the sink, is left out
    canvas, axes = figure(2)
    for axis, (name, layers) in zip(axes, (("table", table), ("prose", prose)), strict=True):
        best: tuple[float, str, Tensor] = (0.0, "", torch.zeros(n // 2 + 1))
        for i, layer in layers.items():
            for h in range(9):
                far = layer.attention(h, first + n).tril(-64).sum(0)[first:]
                kept = far > far.quantile(0.875)
                peak = periodic.bragg_peak(kept, longest=64)
                text = f"layer {i}, head {h}: period {float(peak.period):.1f}, score {float(peak.score):.0f}"
                best = max(best, (float(peak.score), text, periodic.structure_factor(kept.double())))
        axis.plot(range(16, n // 2 + 1), best[2][16:], lw=0.8)
        axis.set(title=f"{name}; {best[1]}", xlabel="wavenumber", ylabel="S", ylim=(0, 130))
        axis.title.set_fontsize(8)
        print(f"structure factor, {name}: {best[1]}")
    return canvas


def hyperbolic_numbers(layers: Layers) -> None:
    """How far rows move when the same q and k are scored on the hyperboloid, by curvature."""
    layer, n = layers[10], FIT_TOKENS
    q, k = (x[None, :, :n].double() * layer.scale**0.5 for x in (layer.q, layer.k))
    causal = torch.ones(n, n, dtype=torch.bool).triu(1)

    def rows(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return states.from_scores((q @ k.mT + bias).masked_fill(causal, -torch.inf))

    flat, bias = rows(q, k), k.square().sum(-1)[:, :, None] / 2
    bias = bias.repeat_interleave(q.shape[1] // k.shape[1], 1)
    for c in (1e-4, 1e-2, 1.0):
        lifted = rows(*lift(q, k, "hyperbolic", c))
        biased = rows(*lift(q, k, "hyperbolic", c), bias)
        print(f"hyperbolic, c = {c:g}: fidelity to the dot product {fidelity.fidelity(flat, lifted).mean():.3f}, with "
              f"|k|^2 / 2 added {fidelity.fidelity(flat, biased).mean():.3f}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--only", nargs="+", help="names of pictures, all without it")
    args = parser.parse_args(argv)
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load("smollm2")
    print(f"SmolLM2-135M, {TOKENS} tokens; {environment()}")
    code, prose = (read_layers(model, tokens_of(model, tokenizer, t, TOKENS)) for t in ("code", "prose"))
    two = torch.cat([tokens_of(model, tokenizer, t, TOKENS // 2) for t in ("code", "prose")], 1)
    row = "| item {} | {} | yes |\n"
    print(f"table: {len(tokenizer(row.format(10, 10)).input_ids)} tokens a line")
    lines = "".join(row.format(10 + i % 90, 10 + 7 * i % 90) for i in range(400))
    pictures: dict[str, Callable[[], Any]] = {
        "states": lambda: states_and_fidelity(code),
        "heads": lambda: entropies(code),
        "fisher_length": lambda: fisher_length(code),
        "scales": lambda: scale_pictures(code),
        "tile_graph": lambda: graph_pictures(read_layers(model, two)),
        "slashes": lambda: slash_pictures(code, *lattice.rotary_frequencies(model)),
        "structure_factor": lambda: structure_pictures(layers_of(model, tokenizer, lines), prose),
    }
    for name in args.only or pictures:
        canvas = pictures[name]()
        canvas.savefig(out / f"{name}.png", dpi=110)
        pyplot.close(canvas)
    hyperbolic_numbers(code)
    pattern_numbers(code)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
