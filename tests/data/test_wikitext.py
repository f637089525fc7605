"""WikiText from local files and from a Hub that is a server of this test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mock_hub import mock_hub, use_hub

from aat_hf.data import DatasetUnavailableError, load_github, load_wikitext, sources
from aat_hf.data.sources import optional_module
from aat_hf.data.wikitext import join_articles

LINES = [
    "",
    " = Lobster = ",
    "",
    " It has claws . ",
    " = = Habitat = = ",
    " The sea . ",
    "",
    " = Ö = ",
    "",
    " A letter . ",
]
ARTICLES = [
    " = Lobster = \n\n It has claws . \n = = Habitat = = \n The sea . \n",
    " = Ö = \n\n A letter . \n",
]
CARD = """---
configs:
- config_name: wikitext-2-raw-v1
  data_files:
  - split: test
    path: wikitext-2-raw-v1/test-*
---
"""


def test_articles_are_joined_from_lines_with_and_without_newlines():
    assert list(join_articles(LINES)) == ARTICLES
    assert list(join_articles(line + "\n" for line in LINES)) == ARTICLES


def test_a_line_like_a_title_inside_a_paragraph_begins_nothing():
    assert list(join_articles(["text", " = 4 = ", "more"])) == ["text\n = 4 = \nmore\n"]


@given(st.lists(st.sampled_from(["", " ", " = A = ", " = = B = = ", "text"])))
def test_no_line_with_text_is_lost(lines: list[str]):
    kept = [line for article in join_articles(lines) for line in article.split("\n") if line.strip()]
    assert kept == [line for line in lines if line.strip()]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_first_publication_is_read_from_a_folder(tmp_path: Path, store: Path, streaming: bool):
    (tmp_path / "wiki.valid.raw").write_text("\n".join(LINES) + "\n", "utf-8")
    rows = load_wikitext(split="validation", path=tmp_path, streaming=streaming)
    assert [row["text"] for row in rows] == ARTICLES


def test_parquet_is_found_below_the_name_and_cut(tmp_path: Path, store: Path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "wikitext-103-v1").mkdir()
    for part in range(2):
        file = tmp_path / "wikitext-103-v1" / f"train-0000{part}-of-00002.parquet"
        datasets.Dataset.from_dict({"text": [f"{line}\n" for line in LINES]}).to_parquet(str(file))
    rows = load_wikitext("wikitext-103-v1", path=tmp_path, articles=False)
    assert len(rows) == 2 * len(LINES)
    assert len(load_wikitext("wikitext-103-v1", "train[:50%]", path=tmp_path, articles=False)) == len(LINES)
    assert load_wikitext("wikitext-103-v1", path=tmp_path)["text"][:] == 2 * ARTICLES


def test_a_changed_file_is_read_anew(tmp_path: Path, store: Path):
    file = tmp_path / "test.txt"
    file.write_text(" = A = \n\n old\n")
    assert "old" in load_wikitext(split="test", path=file)["text"][0]
    file.write_text(" = A = \n\n newer\n")
    assert "newer" in load_wikitext(split="test", path=file)["text"][0]


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("gone.txt", None, "no file"),
        ("test.txt", b"", "is empty: fetch it again"),
        ("test.txt", b"\xff\xfe caf\xe9\n", "damaged"),
        ("test.parquet", b"PAR1 and no more", "damaged"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, store: Path, name: str, data: bytes | None, said: str):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetUnavailableError, match=said) as raised:
        load_wikitext(split="test", path=tmp_path / name)
    assert name in str(raised.value)


def test_bad_names_are_named(tmp_path: Path, store: Path):
    with pytest.raises(DatasetUnavailableError, match=r"no WikiText 'wikitext-3'.*wikitext-2-raw-v1"):
        load_wikitext("wikitext-3")
    with pytest.raises(DatasetUnavailableError, match=r"no files of split 'test'.*wiki\.test\.raw"):
        load_wikitext(split="test", path=tmp_path)
    (tmp_path / "train.parquet").write_bytes(b"x")
    (tmp_path / "other.txt").write_bytes(b"x")
    with pytest.raises(DatasetUnavailableError, match="kinds"):
        sources.load_files([tmp_path / "train.parquet", tmp_path / "other.txt"])


def test_a_table_without_text_is_refused(tmp_path: Path, store: Path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"words": ["a"]}).to_parquet(str(tmp_path / "test.parquet"))
    with pytest.raises(DatasetUnavailableError, match="'words'"):
        load_wikitext(split="test", path=tmp_path)


def test_a_missing_library_comes_with_its_pip_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'aat-hf\[train\]'"):
        load_wikitext()
    with pytest.raises(ImportError, match=r"pip install 'aat-hf\[viz\]'"):
        optional_module("no_such_library", "viz")


@pytest.fixture
def hub(tmp_path: Path, store: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    repository = tmp_path / "hub" / "Salesforce" / "wikitext"
    (repository / "wikitext-2-raw-v1").mkdir(parents=True)
    (repository / "README.md").write_text(CARD)
    file = repository / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"text": [f"{line}\n" for line in LINES]}).to_parquet(str(file))
    return tmp_path / "hub"


def test_the_hub_online_then_offline_then_with_a_damaged_cache(
    hub: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with mock_hub(hub) as (endpoint, asked):
        use_hub(monkeypatch, endpoint, tmp_path)
        assert load_wikitext(split="test")["text"][:] == ARTICLES
        assert [row["text"] for row in load_wikitext(split="test", streaming=True)] == ARTICLES
        assert load_wikitext(split="test", articles=False)["text"][:] == [f"{line}\n" for line in LINES]
        assert any(line.startswith("GET") and line.endswith("test-00000-of-00001.parquet") for line in asked)
        with pytest.raises(DatasetUnavailableError, match="Unknown split"):
            load_wikitext()
        with pytest.raises(DatasetUnavailableError, match="wikitext-103-v1"):
            load_wikitext("wikitext-103-v1")
        with pytest.raises(DatasetUnavailableError, match=r"nobody/nothing was not found .*hf auth login"):
            load_github("nobody/nothing")
    # The server is gone.
    assert load_wikitext(split="test")["text"][:] == ARTICLES
    with pytest.raises(DatasetUnavailableError, match=r"nobody/nothing.*cannot be reached"):
        load_github("nobody/nothing")
    for file in store.glob("Salesforce___wikitext/**/*.arrow"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DatasetUnavailableError, match=r"damaged.*refresh=True") as raised:
        load_wikitext(split="test")
    assert str(store) in str(raised.value)
    with mock_hub(hub) as (endpoint, _):
        use_hub(monkeypatch, endpoint, tmp_path)
        assert load_wikitext(split="test", refresh=True)["text"][:] == ARTICLES
