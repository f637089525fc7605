"""Texts to token sequences of one length: tokenised in parallel, packed, cached; several datasets mixed by weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from aat_hf.data.progress import notice
from aat_hf.data.sources import fingerprint_of, optional_module

IGNORED = -100  # the label that Transformers' losses leave out
_VERSION = 1  # raised when the same texts give other sequences, so that caches are made anew


def encode_dataset(
    dataset: Any,
    tokenizer: Any,
    *,
    length: int,
    text_column: str = "text",
    pack: bool = True,
    pad_tail: bool = True,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> Any:
    """Tokenise the texts of a dataset and cut them into sequences.

    Packed, every row has `length` tokens of one or several documents and no attention mask: `position_ids` begin at 0
    with each document, by which Transformers keeps the documents of a row apart in causal models (with batches of rows
    and without a cache). `labels` are the tokens, but -100 where a document begins, which nothing before it predicts.
    A document ends with the tokenizer's end-of-text token; one longer than a row goes on in the next.

    Not packed, for encoders: each text by itself in rows of at most `length` tokens, with attention mask, for a
    collator that pads.

    Args:
        dataset: A `datasets.Dataset` (the result is cached on disk) or `IterableDataset` (encoded while iterating).
        tokenizer: Of Transformers.
        length: Tokens in a row.
        text_column: Where the texts are; other columns go.
        pack: Whether rows are filled with several documents.
        pad_tail: Fill the last row of each batch with a document of padding (labels -100); else drop it.
        num_proc: Processes; not for an `IterableDataset`, which a DataLoader's workers parallelise.
        batch_size: Texts that are packed together.

    Raises:
        ValueError: No such column, something other than a text in it, no text at all, or a length below 2.
        ImportError: `datasets` is not installed.
    """
    datasets = optional_module("datasets")
    if length < 2:
        raise ValueError(f"length = {length}: two tokens at least are needed to predict one")
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if text_column not in columns:
        raise ValueError(f"no column {text_column!r} in the dataset (columns: {', '.join(columns) or 'none'})")
    options = {"tokenizer": tokenizer, "length": length, "column": text_column}
    if pack:
        options["pad_tail"] = pad_tail
    shared = {
        "function": _packed if pack else _separate,
        "batched": True,
        "batch_size": batch_size,
        "remove_columns": columns,
        "fn_kwargs": options,
    }
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(**shared)
    encoded = _cached_map(dataset, shared, num_proc)
    if len(encoded) == 0:
        raise ValueError(
            f"the {len(dataset)} texts of the dataset make no row of {length} tokens: they are empty or few"
        )
    return encoded


def mix(
    parts: Sequence[Any],
    weights: Sequence[float],
    *,
    seed: int = 0,
    stopping_strategy: str = "all_exhausted",
) -> Any:
    """Rows of several datasets in random order, each dataset drawn with its weight.

    Args:
        parts: Datasets of one kind with the same columns.
        weights: One a dataset, positive; their sum is taken as 1.
        seed: Of the draws.
        stopping_strategy: "all_exhausted" repeats the shorter ones until every row of all has been seen;
            "first_exhausted" stops with the first to end; "all_exhausted_without_replacement" gives each row once.

    Raises:
        ValueError: Weights and datasets do not match.
    """
    if len(parts) != len(weights) or not parts or any(not weight > 0 for weight in weights):
        raise ValueError(f"{len(parts)} datasets with weights {list(weights)}: give one positive weight to each")
    total = sum(weights)
    probabilities = [weight / total for weight in weights]
    return optional_module("datasets").interleave_datasets(
        list(parts), probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy
    )


def _cached_map(dataset: Any, shared: dict[str, Any], num_proc: int | None) -> Any:
    """`Dataset.map`; a result in the cache that cannot be read is made anew in its place."""
    arrow = optional_module("pyarrow")
    options = shared["fn_kwargs"]
    tokenizer = options["tokenizer"]
    fingerprint = None  # `datasets` then hashes the tokenizer itself
    if tokenizer.is_fast:
        # The hash by `datasets` changes when a tokenizer is first used; that of what it does stays.
        others = {name: value for name, value in options.items() if name != "tokenizer"}
        fingerprint = fingerprint_of(
            _VERSION, dataset._fingerprint, shared["function"].__name__, shared["batch_size"], others, _state(tokenizer)
        )
    try:
        return dataset.map(**shared, num_proc=num_proc, new_fingerprint=fingerprint, desc="Encoding")
    except (arrow.ArrowException, EOFError, OSError) as error:
        notice(f"the encoded dataset in the cache is damaged ({error}): encoding again")
        return dataset.map(
            **shared, num_proc=num_proc, new_fingerprint=fingerprint, desc="Encoding", load_from_cache_file=False
        )


def _state(tokenizer: Any) -> str:
    """What decides how a fast tokenizer encodes, without the settings of its last call."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)
    state.pop("padding", None)
    return fingerprint_of(state, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _packed(
    batch: dict[str, list[Any]], tokenizer: Any, length: int, column: str, pad_tail: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of `length` tokens from a batch of texts: input_ids, position_ids and labels, each (rows, length)."""
    documents = _tokens(_texts(batch, column), tokenizer)
    total = sum(map(len, documents))
    padding = -total % length if pad_tail else 0
    documents.append([_padding_token(tokenizer)] * padding)
    kept = total + padding - (total + padding) % length
    sizes = np.array([len(one) for one in documents], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(documents), np.int64, total + padding)[:kept]
    index = np.arange(kept)
    begins = np.repeat(np.cumsum(sizes) - sizes, sizes)[:kept]  # where each token's document begins
    positions = index - np.maximum(begins, index // length * length)
    labels = np.where((positions == 0) | (index >= total), IGNORED, tokens)
    rows = {"input_ids": tokens, "position_ids": positions, "labels": labels}
    return {name: values.reshape(-1, length) for name, values in rows.items()}


def _separate(batch: dict[str, list[Any]], tokenizer: Any, length: int, column: str) -> dict[str, Any]:
    """Rows of at most `length` tokens, none with tokens of two texts."""
    texts = [text for text in _texts(batch, column) if text.strip()]
    if not texts:
        return {name: [] for name in tokenizer.model_input_names}
    encoded = tokenizer(texts, truncation=True, max_length=length, return_overflowing_tokens=True)
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}


def _tokens(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Token ids of each text that is not empty, with the end-of-text token."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        return []
    end = tokenizer.eos_token_id
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False).input_ids
    return [ids if end is None or ids[-1:] == [end] else [*ids, end] for ids in encoded]


def _texts(batch: dict[str, list[Any]], column: str) -> list[str]:
    texts = batch[column]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"column {column!r} holds a {type(text).__name__} ({text!r:.40}): texts are needed")
    return texts


def _padding_token(tokenizer: Any) -> int:
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
