"""Every notebook runs at small size in a kernel of its own, and prints what it measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny

nbformat = pytest.importorskip("nbformat")

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"
SETTINGS = {
    "MIN_LENGTH": 0, "DENSE_PREFIX": 0, "QUERY_TILE": 32, "KEY_TILE": 32, "SINK_KEYS": 32, "LOCAL_KEYS": 32,
    "BACKEND": "gather", "MAX_KEPT": 1,
}  # fmt: skip
READING = "MODEL = {model!r}\nTOKENS = 320\n"
SMALL = {  # the parameters of each notebook, and what it must print
    "quickstart": (READING + "TOLERANCE = 0.5", "loss: dense "),
    "tolerance_and_error": (READING + "TOLERANCES = (0.5, 0.2)\nBUCKETS = 2", "perplexity at"),
    "inside_a_head": (READING + "TOLERANCE = 0.5\nLAYER = 1\nHEAD = 0", "probability in the tiles that were left out"),
    "finetuning": (READING + "STEPS = 3\nTOLERANCE = 0.5\nCHARACTERS = 20_000", "'aat_tiled_calls': 1.0"),
}


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_notebooks_are_short_and_hold_no_outputs(name: str):
    notebook = read(name)
    nbformat.validate(notebook)
    assert f"jupyter notebook examples/notebooks/{name}.ipynb" in notebook.cells[0].source
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 16
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_notebooks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("matplotlib")
    for setting, value in SETTINGS.items():
        monkeypatch.setenv(f"AAT_{setting}", str(value))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parents[1]))
    notebook = read(name)
    parameters, printed = SMALL[name]
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    defined = {line.split(" = ")[0] for line in cell.source.splitlines()}
    cell.source = parameters.format(model=save_tiny(tmp_path / "tiny"))
    assert {line.split(" = ")[0] for line in cell.source.splitlines()} == defined
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    assert printed in "".join(map(_text, notebook.cells))


def _text(cell: Any) -> str:
    """What a cell printed and showed."""
    outputs = cell.get("outputs", [])
    shown = [one.get("text", "") + str(one.get("data", {}).get("text/markdown", "")) for one in outputs]
    return "".join(shown)
