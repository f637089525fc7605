"""Real models and texts, and datasets of token sequences to train on."""

from __future__ import annotations

from aat_hf.data.code_filters import CodeFilters
from aat_hf.data.encode import encode_dataset, mix
from aat_hf.data.github import load_github
from aat_hf.data.loader import DataLoader, Tokenizer
from aat_hf.data.pretrained import (
    ModelUnavailableError,
    cache_dir,
    fetch_gemma3,
    fetch_minilm,
    fetch_qwen05,
    fetch_smollm2,
    resolve_model,
)
from aat_hf.data.sources import DatasetUnavailableError
from aat_hf.data.texts import TextUnavailableError, austen, package_sources, read_text, stdlib_source
from aat_hf.data.wikitext import load_wikitext

__all__ = [
    "CodeFilters",
    "DataLoader",
    "DatasetUnavailableError",
    "ModelUnavailableError",
    "TextUnavailableError",
    "Tokenizer",
    "austen",
    "cache_dir",
    "encode_dataset",
    "fetch_gemma3",
    "fetch_minilm",
    "fetch_qwen05",
    "fetch_smollm2",
    "load_github",
    "load_wikitext",
    "mix",
    "package_sources",
    "read_text",
    "resolve_model",
    "stdlib_source",
]
