"""Texts to read: the standard library, installed packages, files, novels."""

from __future__ import annotations

from pathlib import Path

import pytest

from aat_hf.data import texts


def test_stdlib_source_is_deterministic_and_long_enough():
    short, long = texts.stdlib_source(), texts.stdlib_source(600_000)
    assert texts.stdlib_source() == short
    assert long.startswith(short) and len(long) >= 600_000
    assert "class ArgumentParser" in short
    with pytest.raises(texts.TextUnavailableError, match="--text"):
        texts.stdlib_source(10**9)


def test_package_sources_are_whole_modules_without_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "trees" / "tests").mkdir(parents=True)
    for name, text in {"b": "B" * 5, "a": "A" * 5, "c": "C", "tests/d": "D"}.items():
        (tmp_path / "trees" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert list(texts.package_sources(["trees"])) == ["AAAAA\nBBBBB\nC"]
    assert list(texts.package_sources(["trees"], 6)) == ["AAAAA", "BBBBB", "C"]
    with pytest.raises(texts.TextUnavailableError, match="no source of a package 'shrubs'"):
        list(texts.package_sources(["trees", "shrubs"]))


def test_read_text(tmp_path: Path):
    (tmp_path / "text").write_text("fünf", "utf-8")
    assert texts.read_text(tmp_path / "text") == "fünf"
    assert texts.read_text(None) == texts.stdlib_source()
    with pytest.raises(texts.TextUnavailableError, match="cannot read"):
        texts.read_text(tmp_path / "none")


def test_austen_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AAT_CACHE", str(tmp_path))
    with pytest.raises(texts.TextUnavailableError, match="Persuasion"):
        texts.austen("Ulysses")
    monkeypatch.setattr(texts.shutil, "which", lambda tool: None)
    with pytest.raises(texts.TextUnavailableError, match="apt-get is missing"):
        texts.austen("Emma")
