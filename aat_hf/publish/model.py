"""The trained model and its tokenizer: loaded whole, saved as a repository holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError

import aat_hf
from aat_hf.data.progress import quiet_transformers
from aat_hf.publish.errors import PublishError

_TASKS = {  # by the end of the class's name: the Auto class that loads it, and the Hub's name of its task
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
}
_HEADER_BYTES = 200  # of a tensor in the header of a safetensors file, at most


@dataclass(frozen=True)
class ModelFacts:
    """What the card says about the model.

    Attributes:
        class_name: Of the model.
        auto_class: The Auto class that loads it.
        task: The Hub's name of what it does.
        parameters: How many it has.
        positions: The longest text, in tokens.
        dtype: Of the weights, such as "float32".
        settings: The fields of `AATConfig` that differ from the defaults.
    """

    class_name: str
    auto_class: str
    task: str
    parameters: int
    positions: int
    dtype: str
    settings: dict[str, Any]


def save_model(trained: Path, target: Path, max_file_mb: float | None) -> ModelFacts:
    """Load what a Trainer saved in `trained`; write safetensors, config, remote code and tokenizer to `target`.

    Args:
        trained: Folder of `Trainer.save_model`.
        target: An existing folder.
        max_file_mb: Largest file of weights, in 10⁶ bytes; they are split to fit. None: the library's limit.

    Raises:
        PublishError: A part is missing or does not fit the others, or a single tensor is larger than a file may be.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if not (trained / name).is_file():
            raise PublishError(f"no {name} in {trained}: save model and tokenizer there (trainer.save_model())")
    with quiet_transformers():
        model = _load(trained)
        tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
        if len(tokenizer) > model.config.vocab_size:
            raise PublishError(
                f"the tokenizer in {trained} has {len(tokenizer)} tokens, the model {model.config.vocab_size}: "
                "save the one that it was trained with"
            )
        model.save_pretrained(target, **_limit(model, max_file_mb))
        tokenizer.save_pretrained(target)
    _check_sizes(target, max_file_mb)
    return _facts(model)


def weight_files(folder: Path) -> dict[str, int]:
    """Size of each file of weights in bytes, by name."""
    return {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}


def _load(trained: Path) -> Any:
    """The model, of the very class that was trained."""
    try:
        config = transformers.AutoConfig.from_pretrained(trained)
        name = (config.architectures or ["none"])[0]
        kind = getattr(aat_hf, name, None) or getattr(transformers, name, None)
        if kind is None or _task(name) is None:
            raise PublishError(f"the config in {trained} names the model class {name}: give one of {', '.join(_TASKS)}")
        model, loading = kind.from_pretrained(trained, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, PublishError):
            raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PublishError(f"cannot load {trained} ({first}): save the model there as safetensors") from error
    if wrong := [*loading["missing_keys"], *loading["mismatched_keys"]]:
        raise PublishError(f"the weights in {trained} lack {len(wrong)} tensors of {name} (such as {wrong[0]})")
    return model


def _facts(model: Any) -> ModelFacts:
    name = type(model).__name__
    auto_class, task = _task(name) or ("", "")
    settings = getattr(model.config, "aat", None) or {}
    dtype = str(model.dtype).removeprefix("torch.")
    positions = model.config.get_text_config().max_position_embeddings
    return ModelFacts(name, auto_class, task, model.num_parameters(), positions, dtype, dict(settings))


def _task(class_name: str) -> tuple[str, str] | None:
    return next((task for end, task in _TASKS.items() if class_name.endswith(end)), None)


def _limit(model: Any, max_file_mb: float | None) -> dict[str, int]:
    """For `save_pretrained`, which counts the tensors of a file but not its header."""
    if max_file_mb is None:
        return {}
    return {"max_shard_size": max(1, round(max_file_mb * 1e6) - _HEADER_BYTES * (1 + len(model.state_dict())))}


def _check_sizes(target: Path, max_file_mb: float | None) -> None:
    for name, size in weight_files(target).items():
        if max_file_mb is not None and size > max_file_mb * 1e6:
            raise PublishError(
                f"{name} has {size / 1e6:.3g} MB, more than {max_file_mb:g}: one of its tensors is that large. Allow "
                "larger files (--max-file-mb), or train with a smaller vocabulary or width"
            )
