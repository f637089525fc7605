"""Source code from checkouts and code datasets: what is kept, what is left out, and why."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from mock_hub import mock_hub, use_hub

from aat_hf.data import CodeFilters, DatasetUnavailableError, github, load_github
from aat_hf.data.code_files import UNKNOWN, Checkout, CodeFile, HubRows, decode, license_of_text
from aat_hf.data.code_filters import filter_code

LOOP = "def total(numbers):\n    result = 0\n    for number in numbers:\n        result += number\n    return result\n"
WORDS = [f"value_{number} = compute_{number}(argument_{number})" for number in range(60)]
MIT = "Permission is hereby granted, free of charge,\nto any person obtaining a copy of this software"
ANY = CodeFilters(licenses=None)


def kept(*files: CodeFile, filters: CodeFilters = ANY) -> tuple[list[str], Counter[str]]:
    dropped: Counter[str] = Counter()
    return [row["path"] for row in filter_code(files, filters, dropped)], dropped


def file(path: str, content: str | bytes, license: str = UNKNOWN) -> CodeFile:
    return CodeFile("here", path, license, content)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "vendored").mkdir(parents=True)
    (folder / "LICENSE").write_text(MIT)
    (folder / "good.py").write_text(LOOP)
    (folder / "copy.py").write_text(LOOP)
    (folder / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'café'\n".encode("latin-1"))
    (folder / "broken.py").write_bytes(b"name = 'caf\xe9'\n")
    (folder / "binary.py").write_bytes(b"\0\1\2")
    (folder / "empty.py").write_text("\n")
    (folder / "notes.md").write_text("# Notes\n")
    (folder / "vendored" / "COPYING").write_text("GNU GENERAL PUBLIC LICENSE Version 3, 29 June 2007")
    (folder / "vendored" / "copyleft.py").write_text("copyleft = True\n")
    (folder / "vendored" / "own.py").write_text("# SPDX-License-Identifier: Apache-2.0\nown = True\n")
    return folder


def test_a_checkout_is_filtered(checkout: Path, store: Path, capsys: pytest.CaptureFixture[str]):
    rows = load_github(checkout, filters=CodeFilters(near_duplicates=None))
    assert rows["path"][:] == ["copy.py", "latin.py", "vendored/own.py"]
    assert rows["license"][:] == ["MIT", "MIT", "Apache-2.0"]
    assert set(rows["repository"][:]) == {"project"}
    assert rows["text"][0] == LOOP and "café" in rows["text"][1]
    said = capsys.readouterr().err
    assert "3 of 11 files kept" in said
    for reason in ("3 suffix", "2 not text", "1 exact duplicate", "1 empty", "1 license"):
        assert reason in said


def test_streaming_gives_the_same(checkout: Path, store: Path):
    assert list(load_github(checkout, streaming=True)) == list(load_github(checkout))


def test_the_cache_follows_the_files(checkout: Path, store: Path, capsys: pytest.CaptureFixture[str]):
    load_github(checkout)
    assert "files kept" in capsys.readouterr().err
    load_github(checkout)
    assert "files kept" not in capsys.readouterr().err
    (checkout / "new.py").write_text("new = [1, 2, 3]\n")
    assert "new.py" in load_github(checkout)["path"][:]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_says_what_belongs_to_a_work_tree(checkout: Path):
    (checkout / ".gitignore").write_text("copy.py\n")
    subprocess.run(["git", "init", "--quiet"], cwd=checkout, check=True)
    subprocess.run(["git", "add", "."], cwd=checkout, check=True)
    (checkout / "untracked.py").write_text("x = 1\n")
    names = {path.name for path in Checkout(checkout).paths()}
    assert {"good.py", ".gitignore"} <= names
    assert not {"copy.py", "untracked.py", "config"} & names


def test_duplicates_are_found_over_several_sources(checkout: Path, tmp_path: Path, store: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "again.py").write_text(LOOP)
    (other / "LICENSE").write_text(MIT)
    (other / "only.py").write_text("only = 'here'\n")
    rows = load_github([checkout, str(other)])
    assert rows["path"][:].count("copy.py") == 1
    assert "again.py" not in rows["path"][:] and "only.py" in rows["path"][:]


@pytest.mark.parametrize(
    ("changed", "near"),
    [(2, True), (30, False)],  # Jaccard similarity of the shingles about .93 and .33
)
def test_near_duplicates_go_by_similarity(changed: int, near: bool):
    other = [line.upper() if number < changed else line for number, line in enumerate(WORDS)]
    names, dropped = kept(file("a.py", "\n".join(WORDS)), file("b.py", "\n".join(other)))
    assert names == (["a.py"] if near else ["a.py", "b.py"])
    assert dropped["near duplicate"] == int(near)
    assert kept(file("a.py", "\n".join(WORDS)), file("b.py", "\n".join(other)),
                filters=CodeFilters(licenses=None, near_duplicates=None))[0] == ["a.py", "b.py"]  # fmt: skip


SECRETS = [
    "key = 'AKIA" + "Z7QHT3VNW5RLX2PK'",
    "token = 'ghp_" + "x7Qz2LmN9vRt4KpWs8YbC3dFg6HjTe1uAoXi'",
    "-----BEGIN RSA " + "PRIVATE KEY-----",
]


@pytest.mark.parametrize("line", SECRETS)
def test_files_with_secrets_go(line: str):
    secret = file("secret.py", f"{LOOP}{line}\n")
    assert kept(secret) == ([], Counter({"secret": 1}))
    assert kept(secret, filters=CodeFilters(licenses=None, secrets=False))[0] == ["secret.py"]


def test_ordinary_code_holds_no_secrets():
    assert kept(file("a.py", f"{LOOP}password = os.environ['PASSWORD']\ndigest = '{'0a1b' * 16}'\n"))[0] == ["a.py"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("# Code generated by a tool. DO NOT EDIT.\nx = 1\n", "generated"),
        (f"x = '{'a' * 1001}'\n", "long lines"),
        ("\n".join(["y = " + "a" * 150] * 3), "long lines"),
        ("([{<>}])" * 8, "few letters"),
        ("x = 1\n" * 200_000, "too large"),
        ("", "empty"),
    ],
)
def test_files_of_bad_shape_go(content: str, reason: str):
    assert kept(file("a.py", content))[1] == {reason: 1}


@pytest.mark.parametrize(
    ("license", "passes"),
    [("MIT", True), ("apache-2.0", True), ("MIT AND BSD-3-Clause", True), ("MIT AND GPL-3.0", False), (UNKNOWN, False)],
)
def test_licenses_are_compared_part_by_part(license: str, passes: bool):
    assert bool(kept(file("a.py", LOOP, license), filters=CodeFilters())[0]) == passes


BSD = "Redistribution and use in source and binary forms, with or without modification, are permitted"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Apache License\n   Version 2.0, January 2004", "Apache-2.0"),
        (MIT, "MIT"),
        (BSD, "BSD-2-Clause"),
        (f"{BSD}. Neither the name of the holder", "BSD-3-Clause"),
        ("GNU LESSER GENERAL PUBLIC LICENSE ... the GNU General Public License", "LGPL"),
        ("PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2 ... the GNU General Public License", "PSF-2.0"),
        (f"GNU General Public License. Parts: {MIT}", "GPL"),
        ("All rights reserved.", UNKNOWN),
    ],
)
def test_license_texts_are_known(text: str, name: str):
    assert license_of_text(text) == name


@pytest.mark.parametrize(
    ("content", "path", "text"),
    [
        ("\ufeffx".encode(), "a.js", "x"),
        ("é".encode("latin-1"), "a.js", None),
        (b"# coding: nonsense\n", "a.py", None),
        ("# coding: utf-8\n'ö'".encode(), "a.py", "# coding: utf-8\n'ö'"),
    ],
)
def test_decoding(content: bytes, path: str, text: str | None):
    assert decode(content, path) == text


def test_rows_of_code_datasets_are_understood():
    rows = [
        {
            "content": "a",
            "max_stars_repo_path": "p.py",
            "max_stars_repo_name": "o/r",
            "max_stars_repo_licenses": ["MIT"],
        },
        {"code": "b", "license": "isc"},
    ]
    assert list(HubRows("some/set", rows).files()) == [
        CodeFile("o/r", "p.py", "MIT", "a"),
        CodeFile("some/set", "row1", "isc", "b"),
    ]
    with pytest.raises(DatasetUnavailableError, match=r"some/set is no code dataset.*'image'"):
        list(HubRows("some/set", [{"image": 1}]).files())


def test_a_code_dataset_comes_from_the_hub(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    repository = tmp_path / "hub" / "some" / "code"
    repository.mkdir(parents=True)
    columns = {
        "content": [LOOP, LOOP, "x = 1\n"],
        "path": ["a.py", "b.py", "c.py"],
        "license": ["mit", "mit", "gpl-3.0"],
    }
    datasets.Dataset.from_dict(columns).to_parquet(str(repository / "train-00000-of-00001.parquet"))
    (repository / "README.md").write_text("# Code\n")
    with mock_hub(tmp_path / "hub") as (endpoint, _):
        use_hub(monkeypatch, endpoint, tmp_path)
        assert load_github("some/code")["path"][:] == ["a.py"]
        assert [row["path"] for row in load_github("some/code", streaming=True)] == ["a.py"]


def test_bad_sources_are_named(checkout: Path, tmp_path: Path, store: Path):
    (tmp_path / "void").mkdir()
    for source, said in ((tmp_path / "gone", "no folder"), ("./gone", "no folder"), ([], "no sources"),
                         (tmp_path / "void", "holds no files")):  # fmt: skip
        with pytest.raises(DatasetUnavailableError, match=said):
            load_github(source)
    with pytest.raises(DatasetUnavailableError, match=r"no file passed the filters .*11 suffix"):
        load_github(checkout, filters=CodeFilters(suffixes=(".rs",)))
    with pytest.raises(ValueError, match="near_duplicates"):
        CodeFilters(near_duplicates=1.5)


def test_a_bug_in_a_source_keeps_its_own_error(checkout: Path, store: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(github, "filter_code", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        load_github(checkout)
