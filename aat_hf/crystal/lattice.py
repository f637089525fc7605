"""RoPE as a lattice: the slash profile of a head, predicted from its mean query and mean key alone.

What a user of attention gets: the diagonals (slashes) a head prefers, from O(n d) work and without a score matrix; the
model's own rotary frequencies; keys and queries with their rotation taken off.

With complex pairs z = x1 + i x2, RoPE multiplies by e^(i w_f position) (J. Su et al., *RoFormer*, 2021, eq. 34). The
part of the scores made by the means is exactly Toeplitz, with the symbol t(delta) = Re sum_f q_f conj(k_f) e^(i w_f
delta): the w_f are the reciprocal lattice, |q_f k_f| the structure factor. Wrong frequencies destroy the prediction.
`periodic` treats maps that repeat, `gauge` measures slashes from scores.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aat_hf.quantum._precision import real_dtype, widened


def rotary_frequencies(model: nn.Module) -> tuple[Tensor, float]:
    """Frequencies (head_dim / 2,) in radians a token, and the factor on rotated vectors, of the model's rotary module.

    Raises:
        ValueError: no rotary module with `inv_freq`, or several that differ (give one of them as the model).
    """
    modules: list[Any] = list(model.modules())
    found = [module for module in modules if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary module with `inv_freq`: pass its frequencies yourself")
    first = found[0].inv_freq
    if any(not torch.equal(first, module.inv_freq) for module in found[1:]):
        raise ValueError(
            f"{type(model).__name__} has rotary modules that differ: pass one of them instead of the model"
        )
    return first.detach().clone(), float(getattr(found[0], "attention_scaling", 1.0))


def rotary_pairs(x: Tensor, pairs: int, interleaved: bool = False) -> Tensor:
    """Complex pairs of queries or keys (..., n, d): (..., n, pairs); dimensions from 2 pairs on are not rotated.

    Args:
        interleaved: neighbours form a pair (GPT-J), instead of halves (Llama).

    Raises:
        ValueError: fewer than 2 pairs dimensions.
    """
    if x.shape[-1] < 2 * pairs:
        raise ValueError(f"{pairs} rotary pairs need {2 * pairs} dimensions, got {x.shape[-1]}")
    wide = widened(x[..., : 2 * pairs])
    first, second = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    return torch.complex(first, second).to(_complex(x))


def unrotate(
    x: Tensor,
    frequencies: Tensor,
    positions: Tensor | None = None,
    factor: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Take RoPE off rotated queries or keys (..., n, d): complex pairs (..., n, frequencies).

    Args:
        frequencies: (pairs,) radians a token.
        positions: (..., n), 0, 1, ... without it.
        factor: `attention_scaling`, taken off too.
    """
    place = torch.arange(x.shape[-2], device=x.device) if positions is None else positions
    turn = place.to(torch.float64)[..., None] * frequencies.to(x.device, torch.float64)
    pairs = rotary_pairs(x, len(frequencies), interleaved).to(torch.complex128)
    return (pairs * torch.polar(torch.full_like(turn, 1 / factor), -turn)).to(_complex(x))


def toeplitz_symbol(q: Tensor, k: Tensor, frequencies: Tensor, offsets: Tensor) -> Tensor:
    """t(delta) = Re sum_f q_f conj(k_f) e^(i w_f delta) of complex pairs (..., pairs): (..., offsets).

    The score of a query with rotary pairs q at a key with pairs k which lies `offsets` (offsets,) tokens before it.
    """
    turn = offsets.to(torch.float64)[:, None] * frequencies.to(q.device, torch.float64)
    product = (q * k.conj()).to(torch.complex128)
    symbol = product.real @ turn.cos().mT - product.imag @ turn.sin().mT
    return symbol.to(real_dtype(q, k))


def slash_profile(
    q: Tensor,
    k: Tensor,
    frequencies: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    factor: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """`toeplitz_symbol` of the mean query and mean key of a head, times `scale`: (..., offsets), nats.

    Args:
        q, k: (..., n, d) as the attention function gets them: rotated, positions 0, 1, ..., the factor in both.
        offsets: (offsets,), query position minus key position.
        factor: `attention_scaling` of the rotary module.

    Local maxima are the head's slashes. Up to a constant, which is no matter to softmax.
    """
    mean_q, mean_k = (unrotate(x, frequencies, factor=factor, interleaved=interleaved).mean(-2) for x in (q, k))
    return scale * factor**2 * toeplitz_symbol(mean_q, mean_k, frequencies, offsets)


def local_maxima(profile: Tensor) -> Tensor:
    """Where a profile (..., n) is larger than both neighbours: bool (..., n); the ends are none."""
    inner = (profile[..., 1:-1] > profile[..., :-2]) & (profile[..., 1:-1] >= profile[..., 2:])
    return torch.nn.functional.pad(inner, (1, 1))


def _complex(x: Tensor) -> torch.dtype:
    return real_dtype(x).to_complex()
