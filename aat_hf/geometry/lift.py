"""Attention in curved space by lifting queries and keys, so that its scores stay inner products.

What a user of attention gets: every kernel, selector and audit works unchanged in hyperbolic and spherical space,
because a tile never asks where its queries and keys come from. For models trained with it; it is not a drop-in.

Hyperbolic: q and k are the spatial parts of points on the hyperboloid of curvature -c with times
x0 = sqrt(1 + c |q|^2) and y0 = sqrt(1 + c |k|^2). The lifted product is

    q.k - x0 |k|^2 / (1 + y0) = (x0 - cosh(sqrt(c) d)) / c = x0 / c - 1 / c - |q - k|_L^2 / 2

with the distance d and the squared Lorentzian distance |q - k|_L^2 = d^2 (1 + c d^2 / 12 + ...) (M. Law et al.,
*Lorentzian distance learning for hyperbolic representations*, ICML 2019). The softmax does not see what
depends on the query alone; this choice gives a key at the origin the score 0 and needs no difference of large numbers
at small c, where the score becomes q.k - |k|^2 / 2: Euclidean distance. The squared distance d^2 itself is no inner
product in finitely many dimensions, so it has no lift.

Spherical: q and k are brought to the sphere of curvature c (radius 1 / sqrt(c)); the product is cos(angle) / c.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GEOMETRIES = ("euclidean", "hyperbolic", "spherical")


def lift(q: Tensor, k: Tensor, geometry: str, curvature: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Queries and keys whose inner product is the score of `geometry`, in the dtypes of q and k.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        geometry: one of `GEOMETRIES`.
        curvature: c > 0 in the formulae above, a number or a tensor (kv_heads,) to learn it. None: 1 in hyperbolic
            space; 1 / head_dim on the sphere, where vectors with entries of size 1 lie (normalised queries and keys:
            A. Henry et al., *Query-key normalization for Transformers*, EMNLP 2020).

    Returns:
        q and k with head_dim + 1 (hyperbolic) or head_dim components, computed in float32 or wider. On the sphere a
        vector of zeros stays one. The components stay below sqrt(c) |q| + 1 and min(|k|^2 / 2, |k| / sqrt(c)), and on
        the sphere the entries of the Jacobian below 1 / (sqrt(c) max(|x|, eps)): float16 must be able to hold them.

    Raises:
        ValueError: an unknown geometry, or a curvature tensor that has not one entry for each head of k.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry = {geometry!r}: must be one of {', '.join(map(repr, GEOMETRIES))}")
    if geometry == "euclidean":
        return q, k
    c = default_curvature(geometry, q.shape[-1]) if curvature is None else curvature
    c_q, c_k = _by_head(c, q.shape[1], k.shape[1])
    if geometry == "spherical":
        return _on_sphere(q, c_q), _on_sphere(k, c_k)
    return _query_on_hyperboloid(q, c_q), _key_on_hyperboloid(k, c_k)


def default_curvature(geometry: str, head_dim: int) -> float:
    """The curvature that None stands for in `lift`."""
    return 1.0 if geometry == "hyperbolic" else 1 / head_dim


def _by_head(curvature: float | Tensor, heads: int, kv_heads: int) -> tuple[float | Tensor, float | Tensor]:
    """The curvature to multiply q and k with: numbers, or (heads, 1, 1) and (kv_heads, 1, 1)."""
    if not isinstance(curvature, Tensor):
        return curvature, curvature
    if curvature.shape != (kv_heads,):
        raise ValueError(f"curvature has shape {tuple(curvature.shape)}: must be ({kv_heads},), one for each head of k")
    of_keys = curvature[:, None, None]
    return of_keys.repeat_interleave(heads // kv_heads, 0), of_keys


def _query_on_hyperboloid(q: Tensor, c: float | Tensor) -> Tensor:
    wide = _wide(q)
    time = (1 + c * _squared(wide)).sqrt()
    return torch.cat([wide, -time], -1).to(q.dtype)


def _key_on_hyperboloid(k: Tensor, c: float | Tensor) -> Tensor:
    wide = _wide(k)
    squared = _squared(wide)
    rise = squared / (1 + (1 + c * squared).sqrt())  # (time - 1) / c
    return torch.cat([wide, rise], -1).to(k.dtype)


def _on_sphere(x: Tensor, c: float | Tensor) -> Tensor:
    wide = _wide(x)
    tiny = torch.finfo(x.dtype).eps ** 2  # a finite gradient at 0; lost in rounding where |x|^2 > eps
    root = c.sqrt() if isinstance(c, Tensor) else math.sqrt(c)
    return (wide * (_squared(wide) + tiny).rsqrt() / root).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _squared(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)
