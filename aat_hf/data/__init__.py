"""Real models and texts for the demo, the tests and the benchmarks."""

from __future__ import annotations

from aat_hf.data.pretrained import (
    ModelUnavailableError,
    cache_dir,
    fetch_minilm,
    fetch_qwen05,
    fetch_smollm2,
    resolve_model,
)
from aat_hf.data.texts import TextUnavailableError, austen, read_text, stdlib_source

__all__ = [
    "ModelUnavailableError",
    "TextUnavailableError",
    "austen",
    "cache_dir",
    "fetch_minilm",
    "fetch_qwen05",
    "fetch_smollm2",
    "read_text",
    "resolve_model",
    "stdlib_source",
]
