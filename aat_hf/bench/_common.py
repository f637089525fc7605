"""What the benchmarks share: models, texts, looking into attention calls, tables."""

from __future__ import annotations

import csv
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from aat_hf.compare import replaced_attention
from aat_hf.data import TextUnavailableError, austen, fetch_gemma3, fetch_qwen05, fetch_smollm2, read_text
from aat_hf.errors import UnsupportedAttentionError
from aat_hf.hf.masks import from_argument
from aat_hf.tiling.masks import AttentionMask

MODELS: dict[str, Callable[[], Path]] = {"smollm2": fetch_smollm2, "qwen05": fetch_qwen05, "gemma3": fetch_gemma3}
TEXTS: dict[str, Callable[[int], str]] = {
    "code": lambda characters: read_text(None, min_chars=characters),
    "prose": lambda characters: austen("Emma")[:characters],
}
_CHARS_PER_TOKEN = 8

Look = Callable[[int, Tensor, Tensor, Tensor, AttentionMask, float], None]
"""Called once per layer with its index, q (batch, heads, queries, head_dim), k (batch, kv_heads, keys, head_dim), v
(batch, kv_heads, keys, value_dim), the mask and the scale."""


def load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer: a name of `MODELS`, a folder, or a name on the Hub; float32 on the CPU."""
    from aat_hf.demo import load_model

    return load_model(str(MODELS[name]()) if name in MODELS else name, None)


def tokens_of(model: Any, tokenizer: Any, text: str, tokens: int) -> Tensor:
    """The first `tokens` tokens of a text of `TEXTS` or of a file: (1, tokens)."""
    characters = tokens * _CHARS_PER_TOKEN
    content = TEXTS[text](characters) if text in TEXTS else read_text(text)
    ids = tokenizer(content[: 4 * characters], verbose=False).input_ids[:tokens]
    if len(ids) < tokens:
        raise TextUnavailableError(f"{text} has {len(ids)} tokens, {tokens} are wanted: choose a longer text")
    return torch.tensor([ids], device=model.device)


@torch.inference_mode()
def look_at_layers(model: Any, input_ids: Tensor, look: Look) -> None:
    """Run the model densely and show every attention call to `look`."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def looking(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
        ) -> Any:
            mask, scale = mask_and_scale(query, key, attention_mask, kwargs)
            look(int(getattr(module, "layer_idx", 0) or 0), query, key, value, mask, scale)
            return function(module, query, key, value, attention_mask, **kwargs)

        return looking

    model.set_attn_implementation("sdpa")
    with replaced_attention("sdpa", wrap):
        model(input_ids=input_ids, use_cache=False, logits_to_keep=1)


def mask_and_scale(
    query: Tensor, key: Tensor, attention_mask: Any, kwargs: Mapping[str, Any]
) -> tuple[AttentionMask, float]:
    """The mask and the scale of an attention call of a causal model.

    Raises:
        UnsupportedAttentionError: its scores are more than scaled products, which is not known here.
    """
    shape = dict(batch=query.shape[0], heads=query.shape[1], queries=query.shape[2], keys=key.shape[2])
    mask, bias = from_argument(attention_mask, **shape, is_causal=True, device=query.device)
    if bias is not None or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "sinks")):
        raise UnsupportedAttentionError(
            "the model has softcapped scores, attention sinks or a bias, which this benchmark leaves out: "
            "choose another model, or `aat bench selection` without --groupings"
        )
    return mask, kwargs.get("scaling") or query.shape[-1] ** -0.5


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass instances, one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [f"| {' | '.join(head)} |", "|" + "|".join([":--"] + ["--:"] * (len(head) - 1)) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def environment() -> str:
    """The machine and the versions, in one line."""
    return (
        f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
