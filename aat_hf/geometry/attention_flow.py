"""The path of attention rows from layer to layer: each step moves sqrt(p) along a great circle.

What a user of attention gets: how far each layer moves what a token attends to, in which direction, and whether the
layers move it straight or to and fro. Short paths can share a tile map from layer to layer.

Rows are points of the simplex under the Fisher metric, that is of the sphere of radius 2 (`fisher`); a layer is one
unit of time. Source: J. Milnor, *Morse Theory* (1963), section 12, for length and energy.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from aat_hf.geometry import fisher


class AttentionFlow(NamedTuple):
    """The path of rows (layers, ..., n) along geodesics of the Fisher metric.

    velocity: (layers - 1, ..., n) at the start of each step; reaches the next layer in unit time.
    speed: (layers - 1, ...) length of each step, radians in [0, pi].
    length: (...) of the whole path. energy: (...) sum of speed^2 / 2, at least length^2 / (2 (layers - 1)), and equal
    to it for a constant speed. displacement: (...) distance from the first to the last layer, at most the length.
    """

    velocity: Tensor
    speed: Tensor
    length: Tensor
    energy: Tensor
    displacement: Tensor


def attention_flow(rows: Tensor) -> AttentionFlow:
    """Velocity, speed, length and energy of the path of attention `rows` (layers, ..., n), layer by layer.

    Zeros are allowed in a row; a row of zeros gives NaN.

    Raises:
        ValueError: fewer than two layers.
    """
    if rows.ndim < 2 or len(rows) < 2:
        raise ValueError(f"a path needs rows (layers, ..., n) of two layers or more, got shape {tuple(rows.shape)}")
    before, after = rows[:-1], rows[1:]
    speed = fisher.distance(before, after)
    energy = fisher.distance2(before, after).sum(0) / 2
    return AttentionFlow(fisher.logmap(before, after), speed, speed.sum(0), energy, fisher.distance(rows[0], rows[-1]))


def positions(rows: Tensor, time: Tensor) -> Tensor:
    """The path of `rows` (layers, ..., n) at times (t,) in [0, layers - 1]: (t, ..., n).

    Raises:
        ValueError: a time outside the path.
    """
    last = len(rows) - 1
    if last < 1 or not bool(((time >= 0) & (time <= last)).all()):
        raise ValueError(f"times must lie in [0, {last}] and the path have two layers or more")
    start = time.detach().floor().long().clamp(max=last - 1)
    part = (time - start).reshape(-1, *[1] * (rows.ndim - 2)).expand(-1, *rows.shape[1:-1])
    return fisher.geodesic(rows[start], rows[start + 1], part)
