"""The repository's folder: built aside, put in place whole."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from aat_hf.data.sources import optional_module
from aat_hf.publish.card import render_card
from aat_hf.publish.errors import PublishError
from aat_hf.publish.evaluation import evaluation_tables
from aat_hf.publish.model import save_model, weight_files
from aat_hf.publish.picture import PICTURE, draw_losses
from aat_hf.publish.training import Training, loss_table, read_training, write_log

SUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Sources:
    """What a repository is made of.

    Attributes:
        trained: Folder of the model, its tokenizer and trainer_state.json.
        evaluation: Folder with the CSV files of an evaluation, and eval.png if there is one.
        name: Title of the card.
        repository: Name under which the card loads the model.
        license: The Hub's identifier of the licence.
        license_file: Its text.
        data: What it was trained on, and that text's licence.
        hardware: What it was trained on, as a machine.
        dense: Folder with the trainer_state.json of the dense twin.
        template: Of the card; None: the package's.
        max_file_mb: Largest file of weights, in 10⁶ bytes.
    """

    trained: Path
    evaluation: Path
    name: str
    repository: str
    license: str
    license_file: Path
    data: str
    hardware: str
    dense: Path | None = None
    template: Path | None = None
    max_file_mb: float | None = None


def build(sources: Sources, target: Path) -> None:
    """Make the repository at `target`, which does not exist yet or is an empty folder.

    Raises:
        PublishError: A file or number is missing, or something is at the target already; nothing is left there.
        ImportError: matplotlib is not installed.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise PublishError(f"{target} exists: give a new folder, or move it away")
    optional_module("matplotlib", "viz")  # before the work, not after it
    training = read_training(sources.trained)
    dense = None if sources.dense is None else read_training(sources.dense)
    tables = evaluation_tables(sources.evaluation)
    if not sources.license_file.is_file() or not sources.license_file.read_text("utf-8").strip():
        raise PublishError(f"no licence in {sources.license_file}: name a file with its text (--license-file)")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        _fill(made, sources, training, dense, tables)
        if target.exists():
            target.rmdir()
        made.replace(target)


def sha256_sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below the folder but `SHA256SUMS`, by its path with "/"."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    return {file.relative_to(folder).as_posix(): _sha256(file) for file in files}


def _fill(made: Path, sources: Sources, training: Training, dense: Training | None, tables: dict[str, str]) -> None:
    model = save_model(sources.trained, made, sources.max_file_mb)
    weights = weight_files(made)
    (made / "eval").mkdir()
    picture = (sources.evaluation / "eval.png").is_file()
    for name in [*tables, *(["eval.png"] if picture else [])]:
        shutil.copyfile(sources.evaluation / name, made / "eval" / name)
    shutil.copyfile(sources.license_file, made / "LICENSE")
    write_log(training, made / "training_log.csv")
    if dense is not None:
        write_log(dense, made / "training_log_dense.csv")
    losses = loss_table(training, dense)  # refuses a twin of other steps
    draw_losses(training, dense, made / PICTURE)
    card = render_card(
        sources.template,
        vars(sources)
        | {
            "model": model,
            "weights": weights,
            "weights_bytes": sum(weights.values()),
            "training": training,
            "dense": dense,
            "loss_table": losses,
            "loss_picture": PICTURE,
            "evaluation": tables,
            "picture": picture,
        },
    )
    (made / "README.md").write_text(card, "utf-8")
    sums = "".join(f"{digest}  {name}\n" for name, digest in sha256_sums(made).items())
    (made / SUMS).write_text(sums, "utf-8", newline="\n")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
