"""`Tokenizer` and `DataLoader`: from a name to batches in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aat_hf.data.encode import encode_dataset
from aat_hf.data.github import load_github
from aat_hf.data.pretrained import resolve_model
from aat_hf.data.wikitext import load_wikitext


class Tokenizer:
    """A tokenizer of Transformers that encodes texts and whole datasets.

    Args:
        source: A tokenizer, a folder, a name on the Hub, or None for SmolLM2's.
    """

    def __init__(self, source: Any = None) -> None:
        if source is None or isinstance(source, str | Path):
            from transformers import AutoTokenizer

            source = AutoTokenizer.from_pretrained(resolve_model(source))
        self.tokenizer = source

    def encode(self, texts: Any, length: int | None = None, **options: Any) -> Any:
        """A text to token ids, (1, tokens), at most `length`; a dataset to rows of `length` tokens.

        Args:
            texts: A string, or a dataset (see `aat_hf.data.encode_dataset`, which `options` are for).
            length: Required for a dataset.

        Raises:
            ValueError: A dataset without length.
        """
        if isinstance(texts, str):
            ids: Tensor = torch.tensor([self.tokenizer(texts, verbose=False).input_ids[:length]])
            return ids
        if length is None:
            raise ValueError("a dataset is encoded to rows of one length: give length=")
        return encode_dataset(texts, self.tokenizer, length=length, **options)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of token ids, (tokens,) or (1, tokens)."""
        text: str = self.tokenizer.decode(torch.as_tensor(ids).flatten())
        return text


class DataLoader(torch.utils.data.DataLoader[dict[str, Tensor]]):
    """Batches of packed sequences: input_ids, position_ids and labels, each (batch, length).

    It is PyTorch's DataLoader, made by `from_wikitext` or `from_github`.
    """

    @classmethod
    def from_wikitext(
        cls, tokenizer: Any = None, *, length: int = 1024, batch_size: int = 8, shuffle: bool = False, **source: Any
    ) -> DataLoader:
        """Batches of WikiText.

        Args:
            tokenizer: As of `Tokenizer`.
            length: Tokens in a row.
            batch_size: Rows in a batch.
            shuffle: Random order of the rows; not when streaming.
            source: For `load_wikitext`.
        """
        return cls._of(load_wikitext(**source), tokenizer, length, batch_size, shuffle)

    @classmethod
    def from_github(
        cls,
        sources: str | Path | Sequence[str | Path],
        tokenizer: Any = None,
        *,
        length: int = 1024,
        batch_size: int = 8,
        shuffle: bool = False,
        **source: Any,
    ) -> DataLoader:
        """Batches of source code; `sources` and `source` are for `load_github`, the rest as of `from_wikitext`."""
        return cls._of(load_github(sources, **source), tokenizer, length, batch_size, shuffle)

    @classmethod
    def _of(cls, texts: Any, tokenizer: Any, length: int, batch_size: int, shuffle: bool) -> DataLoader:
        rows = Tokenizer(tokenizer).encode(texts, length=length).with_format("torch")
        return cls(rows, batch_size=batch_size, shuffle=shuffle)
