"""Packing keeps every token and keeps documents apart; mixing keeps the weights; caches mend themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import END, PAD, byte_tokenizer, tiny_llama
from transformers import PreTrainedTokenizerFast
from transformers.masking_utils import find_packed_sequence_indices

from aat_hf.data import DataLoader, Tokenizer, encode_dataset, mix
from aat_hf.data.encode import IGNORED, _packed

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def texts_of(*texts: Any) -> Any:
    return datasets.Dataset.from_dict({"text": list(texts), "other": list(range(len(texts)))})


def packed_by_hand(documents: list[list[int]], length: int) -> list[list[tuple[int, int]]]:
    """Rows of (token, position), the last one padded."""
    rows: list[list[tuple[int, int]]] = [[]]
    for document in documents:
        position = 0
        for token in document:
            if len(rows[-1]) == length:
                rows.append([])
                position = 0
            rows[-1].append((token, position))
            position += 1
    rows[-1] += [(PAD, position) for position in range(length - len(rows[-1]))]
    return rows


@given(texts=st.lists(st.text(max_size=12), max_size=8), length=st.integers(2, 9))
@settings(deadline=None)
def test_packing_equals_a_plain_loop(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int):
    documents = [[*tokenizer(text).input_ids, END] for text in texts if text.strip()]
    rows = _packed({"text": texts}, tokenizer, length, "text", True)
    expected = packed_by_hand(documents, length) if documents else []
    assert rows["input_ids"].tolist() == [[token for token, _ in row] for row in expected]
    assert rows["position_ids"].tolist() == [[position for _, position in row] for row in expected]
    unpadded = sum(map(len, documents))
    whole = _packed({"text": texts}, tokenizer, length, "text", False)
    assert whole["input_ids"].tolist() == rows["input_ids"][: unpadded // length].tolist()
    ignored = (rows["position_ids"] == 0) | (rows["input_ids"] == PAD)
    assert (rows["labels"][ignored] == IGNORED).all()
    assert (rows["labels"][~ignored] == rows["input_ids"][~ignored]).all()


def test_transformers_sees_the_documents(tokenizer: PreTrainedTokenizerFast, store: Path):
    rows = encode_dataset(texts_of("abcd", "ef", "ghi"), tokenizer, length=7).with_format("torch")
    documents = find_packed_sequence_indices(rows["position_ids"][:])
    assert documents is not None
    assert documents.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 1, 1, 2, 2]]  # the third row's end is padding


@pytest.mark.parametrize("implementation", ["sdpa", "aat"])
def test_packed_documents_get_the_loss_of_single_ones(
    tokenizer: PreTrainedTokenizerFast, store: Path, implementation: str
):
    model = tiny_llama()
    model.set_attn_implementation(implementation)
    texts = ["first", "the second", "3", "number four"]
    rows = encode_dataset(texts_of(*texts), tokenizer, length=40).with_format("torch")
    with torch.inference_mode():
        packed = model(**rows[:], use_cache=False).loss
        singles = [torch.tensor([[*tokenizer(text).input_ids, END]]) for text in texts]
        losses = [float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) for ids in singles]
    assert float(packed) == pytest.approx(sum(losses) / sum(ids.shape[1] - 1 for ids in singles), abs=1e-5)


def test_streams_and_processes_give_the_same_tokens(tokenizer: PreTrainedTokenizerFast, store: Path):
    texts = texts_of(*(f"document {number}" * number for number in range(40)))
    stored = encode_dataset(texts, tokenizer, length=16, batch_size=10)
    streamed = list(encode_dataset(texts.to_iterable_dataset(), tokenizer, length=16, batch_size=10))
    assert [list(row["input_ids"]) for row in streamed] == stored["input_ids"][:]
    assert stored.column_names == ["input_ids", "position_ids", "labels"]


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")  # fork, Python 3.12 and later
def test_several_processes_lose_nothing(tokenizer: PreTrainedTokenizerFast, store: Path):
    texts = texts_of(*(f"document {number}" for number in range(20)))
    rows = encode_dataset(texts, tokenizer, length=16, num_proc=2)
    tokens = [token for row in rows["input_ids"][:] for token in row if token not in (END, PAD)]
    assert tokenizer.decode(tokens) == "".join(texts["text"][:])


def test_texts_by_themselves_keep_every_token(tokenizer: PreTrainedTokenizerFast, store: Path):
    rows = encode_dataset(texts_of("abcdefgh", "", "ij"), tokenizer, length=3, pack=False)
    assert [len(ids) for ids in rows["input_ids"]] == [3, 3, 2, 2]
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["abc", "def", "gh", "ij"]
    assert rows["attention_mask"][2] == [1, 1]


def test_a_second_run_reads_the_cache_whatever_the_tokenizer_did(tokenizer: PreTrainedTokenizerFast, store: Path):
    texts = datasets.Dataset.from_generator(lambda: ({"text": f"text {n}"} for n in range(30)), fingerprint="texts")
    first = encode_dataset(texts, tokenizer, length=8)
    tokenizer(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves traces in the tokenizer
    assert encode_dataset(texts, tokenizer, length=8).cache_files == first.cache_files != []
    assert encode_dataset(texts, tokenizer, length=9).cache_files != first.cache_files


def test_a_damaged_cache_is_made_anew(
    tokenizer: PreTrainedTokenizerFast, store: Path, capsys: pytest.CaptureFixture[str]
):
    texts = datasets.Dataset.from_generator(lambda: ({"text": f"text {n}"} for n in range(30)), fingerprint="damaged")
    encoded = encode_dataset(texts, tokenizer, length=8)
    rows, file = encoded["input_ids"][:], Path(encoded.cache_files[0]["filename"])
    del encoded
    file.write_bytes(file.read_bytes()[:-400])
    assert encode_dataset(texts, tokenizer, length=8)["input_ids"][:] == rows
    assert "damaged" in capsys.readouterr().err
    assert len(texts) == 30


@pytest.mark.parametrize(
    ("texts", "options", "said"),
    [
        (("a",), {"text_column": "content"}, r"no column 'content' in the dataset \(columns: text, other\)"),
        (("a",), {"length": 1}, "two tokens"),
        (("", "  \n"), {}, "the 2 texts of the dataset make no row of 8 tokens"),
        (("ab",), {"pad_tail": False}, "the 1 texts of the dataset make no row"),
        ((1, 2), {}, r"column 'text' holds a int \(1\)"),
        (("a", None), {}, "holds a NoneType"),
    ],
)
def test_bad_input_is_named(
    tokenizer: PreTrainedTokenizerFast, store: Path, texts: tuple[Any, ...], options: dict[str, Any], said: str
):
    with pytest.raises(ValueError, match=said):
        encode_dataset(texts_of(*texts), tokenizer, **({"length": 8} | options))


def test_an_empty_stream_is_named(tokenizer: PreTrainedTokenizerFast):
    empty = datasets.IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match=r"columns: none"):
        encode_dataset(empty, tokenizer, length=8)


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_mixed_by_weight(streaming: bool):
    parts = [datasets.Dataset.from_dict({"part": [part] * 2000}) for part in range(2)]
    if streaming:
        parts = [part.to_iterable_dataset() for part in parts]
    mixed = mix(parts, [3, 1], seed=1, stopping_strategy="first_exhausted")
    drawn = [row["part"] for row in mixed]
    assert sum(drawn) / len(drawn) == pytest.approx(0.25, abs=0.03)  # 2000 draws and more: three standard deviations
    assert drawn == [row["part"] for row in mix(parts, [3, 1], seed=1, stopping_strategy="first_exhausted")]


def test_mixing_loses_nothing_by_default_and_refuses_bad_weights():
    parts = [datasets.Dataset.from_dict({"n": list(range(start, start + 10))}) for start in (0, 10)]
    assert set(mix(parts, [0.9, 0.1])["n"]) == set(range(20))
    for weights in ([1], [1, 0], [1, float("nan")]):
        with pytest.raises(ValueError, match="2 datasets with weights"):
            mix(parts, weights)


def test_tokenizer_and_loader(tokenizer: PreTrainedTokenizerFast, store: Path, tmp_path: Path):
    ids = Tokenizer(tokenizer).encode("abc")
    assert ids.shape == (1, 3) and Tokenizer(tokenizer).decode(ids) == "abc"
    assert Tokenizer(tokenizer).encode("abc", 2).shape == (1, 2)
    with pytest.raises(ValueError, match="give length="):
        Tokenizer(tokenizer).encode(texts_of("a"))
    (tmp_path / "train.txt").write_text(" = A = \n\n words of an article \n" * 20)
    (tmp_path / "code.py").write_text("def function():\n    return 'a string'\n" * 9)
    (tmp_path / "LICENSE").write_text("This is free and unencumbered software released into the public domain.")
    loaders = [
        DataLoader.from_wikitext(tokenizer, length=16, batch_size=3, path=tmp_path / "train.txt"),
        DataLoader.from_wikitext(tokenizer, length=16, batch_size=3, path=tmp_path / "train.txt", streaming=True),
        DataLoader.from_github(tmp_path, tokenizer, length=16, batch_size=3, shuffle=True),
    ]
    for loader in loaders:
        batch = next(iter(loader))
        assert {name: values.shape for name, values in batch.items()} == dict.fromkeys(
            ("input_ids", "position_ids", "labels"), (3, 16)
        )
        assert all(values.dtype == torch.int64 for values in batch.values())
