"""Measuring: Born probabilities of the tiles for chosen query rows, from their scores against all keys.

psi = sqrt(softmax) is a state; measuring it with the projectors on the key tiles gives tile J with probability
P(J) = sum_{j in J} p_j. The scores of a row are computed against all its keys and summed per tile.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

from aat_hf.tiling.layout import group_heads, tiles
from aat_hf.tiling.masks import AttentionMask, IntervalMask

if TYPE_CHECKING:
    from aat_hf.kernels.cpu_bytes import ByteRows

_CHUNK_ELEMENTS = 1 << 24  # scores held at a time (64 MiB)
_CHUNK_ROWS = 128  # short chunks let causal rows skip the keys after them
_LARGEST_ERROR = 0.2  # nats; most heads have .03 to .15, those with some channels far from 0 (Qwen2.5's first layer) 8


class RoughKeys:
    """Keys for estimates; given to the functions below, it allows scores and exponentials that are not exact.

    On a CPU exponentials may then be 4 % off, and processors that are faster with them take q and k rounded to 8 bits,
    row by row, unless that would change scores by more than `_LARGEST_ERROR`. Elsewhere estimates are exact.

    Args:
        q, k, scale: of `measure_rows`.
    """

    def __init__(self, q: Tensor, k: Tensor, scale: float) -> None:
        self._q, self._k, self._scale = q, k, scale

    @cached_property
    def rounded(self) -> ByteRows | None:
        """The rows of k (batch * kv_heads * keys, head_dim), rounded; None where that is too rough for some head."""
        from aat_hf.kernels.cpu import as_matrix  # numba, loaded when needed
        from aat_hf.kernels.cpu_bytes import byte_rows, score_error

        rows = byte_rows(as_matrix(self._k))
        return rows if score_error(self._q, self._k, rows, self._scale) <= _LARGEST_ERROR else None


class RowMasses(NamedTuple):
    """probability: P(J) of rows and key tiles (batch, heads, R, key_tiles); lse: of whole rows (batch, heads, R)."""

    probability: Tensor
    lse: Tensor


def measure_rows(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rough: RoughKeys | None = None,
) -> RowMasses:
    """Born probabilities of the key tiles and log-sum-exp of the query `rows` (R,), exact unless `rough`.

    Args:
        q: (batch, heads, queries, head_dim).
        k: (batch, kv_heads, keys, head_dim).
        sinks: (heads,) logits of one more key, which belongs to no tile.
        rough: of k, where an estimate will do.

    Returns:
        float32 or wider; a row without keys has probabilities 0 and log-sum-exp -inf.
    """
    if on_cpu_kernels(mask, q):
        from aat_hf.kernels import cpu_rows  # numba, loaded when needed

        how = (key_tile, scale, softcap)
        return RowMasses(*cpu_rows.measure_rows(q, k, mask, rows, *how, sinks=sinks, rough=rough))
    return normalised(_tile_log_mass(q, k, mask, rows, key_tile, scale, softcap), sinks)


def measure_query_tiles(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rough: RoughKeys | None = None,
) -> Tensor:
    """Mean probabilities of the `rows` (query_tiles, rows of each) that see a key; else as `measure_rows`.

    Returns:
        (batch, heads, query_tiles, key_tiles) float32 or wider.
    """
    if on_cpu_kernels(mask, q):
        from aat_hf.kernels import cpu_rows  # numba, loaded when needed

        how = (key_tile, scale, softcap)
        return cpu_rows.measure_rows(
            q, k, mask, rows.flatten(), *how, sinks=sinks, together=rows.shape[1], rough=rough
        )[0]
    return mean_over_query_tiles(measure_rows(q, k, mask, rows.flatten(), key_tile, scale, softcap, sinks), len(rows))


def on_cpu_kernels(mask: AttentionMask, q: Tensor) -> TypeGuard[IntervalMask]:
    """Whether `aat_hf.kernels.cpu_rows` serves the call."""
    return q.device.type == "cpu" and q.dtype != torch.float64 and isinstance(mask, IntervalMask)


def normalised(log_mass: Tensor, sinks: Tensor | None) -> RowMasses:
    """Probabilities and log-sum-exp from tile log masses (batch, heads, R, key_tiles)."""
    lse = torch.logsumexp(log_mass, -1)
    probability = torch.exp(log_mass - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return with_sinks(RowMasses(probability, lse), sinks)


def with_sinks(masses: RowMasses, sinks: Tensor | None) -> RowMasses:
    """The masses when each row has one more key, with the logit `sinks` (heads,) of its head."""
    if sinks is None:
        return masses
    lse = torch.logaddexp(masses.lse, sinks.to(masses.lse)[None, :, None])
    return RowMasses(masses.probability * torch.exp(masses.lse - lse)[..., None], lse)


def _tile_log_mass(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """log sum_{j in J} exp(score_ij): (batch, heads, R, key_tiles); -inf where a row sees no key of the tile."""
    batch, heads = q.shape[:2]
    step = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // (batch * heads * k.shape[2])))
    pieces = []
    for part in rows.split(step):
        mass = torch.logsumexp(scores_by_tile(q, k, mask, part, key_tile, scale, softcap), -1)
        after = tiles(k.shape[2], key_tile) - mass.shape[-1]
        pieces.append(torch.nn.functional.pad(mass, (0, after), value=float("-inf")))
    return torch.cat(pieces, 2)


def scores_by_tile(
    q: Tensor,
    k: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    key_tile: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Masked scores of `rows`: (batch, heads, R, key tiles up to the last one seen, key_tile), float32 or wider."""
    kv_heads, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    high = min(k.shape[2], tiles(max(1, mask.key_range(rows)[1]), key_tile) * key_tile)
    q_rows = group_heads(q[:, :, rows] * scale, kv_heads)
    scores = (q_rows @ k[:, :, :high].mT).to(dtype)
    scores = scores.view(q.shape[0], q.shape[1], len(rows), high)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill_(~mask.rows(rows)[..., :high], float("-inf"))
    scores = torch.nn.functional.pad(scores, (0, -high % key_tile), value=float("-inf"))
    return scores.unflatten(-1, (-1, key_tile))


def mean_over_query_tiles(masses: RowMasses, query_tiles: int) -> Tensor:
    """Mean over the rows of each query tile that see a key: (batch, heads, query_tiles, key_tiles)."""
    alive = (masses.lse > float("-inf")).unflatten(2, (query_tiles, -1)).sum(-1).clamp(min=1)
    return masses.probability.unflatten(2, (query_tiles, -1)).sum(3) / alive[..., None]
