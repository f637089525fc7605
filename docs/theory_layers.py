"""Attention calls of a real model, for theory_pictures.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aat_hf.bench._common import look_at_layers

TOKENS, LAYERS = 2048, (0, 5, 10, 15, 20, 25)


@dataclass(frozen=True)
class Layer:
    """One attention call: q (heads, n, d), k and v (kv_heads, n, d), as the attention function gets them."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    def keys(self, head: int) -> Tensor:
        """Keys of a query head: (n, d)."""
        return self.k[head * len(self.k) // len(self.q)]

    def values(self, head: int) -> Tensor:
        """Values of a query head: (n, d)."""
        return self.v[head * len(self.v) // len(self.q)]

    def scores(self, head: int, n: int = TOKENS) -> Tensor:
        """Scores of the first n tokens, -inf after the diagonal: (n, n) float64."""
        s = self.scale * (self.q[head, :n].double() @ self.keys(head)[:n].double().mT)
        return s.masked_fill(torch.ones(s.shape, dtype=torch.bool).triu(1), -torch.inf)

    def attention(self, head: int, n: int = TOKENS) -> Tensor:
        """Attention of the first n tokens: (n, n) float64."""
        return self.scores(head, n).softmax(-1)


Layers = dict[int, Layer]


def read_layers(model: Any, input_ids: Tensor) -> Layers:
    """The attention calls of `LAYERS`."""
    found: Layers = {}

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scale: float) -> None:
        if layer in LAYERS:
            found[layer] = Layer(*(x[0].clone() for x in (q, k, v)), scale)

    look_at_layers(model, input_ids, look)
    return found


def layers_of(model: Any, tokenizer: Any, text: str) -> Layers:
    """`LAYERS` on the first `TOKENS` tokens of a text."""
    ids = tokenizer(text, verbose=False).input_ids[:TOKENS]
    return read_layers(model, torch.tensor([ids]))
