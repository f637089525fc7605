"""What the fine-tuning examples read: texts, a tokenizer trained on them, rows of tokens."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from aat_hf.data import (
    ModelUnavailableError,
    austen,
    encode_dataset,
    load_wikitext,
    package_sources,
    read_text,
    stdlib_source,
)
from aat_hf.data.wikitext import NAMES

PACKAGES = ("networkx", "numpy", "sympy", "torch", "transformers")  # what an installation brings along
LICENCES = {  # what the texts are, with their licences
    "code": "source of Python's standard library (PSF-2.0)",
    "packages": "source of networkx, NumPy, SymPy, PyTorch (BSD-3-Clause) and Transformers (Apache-2.0); held out: of "
    "Python's standard library (PSF-2.0)",
    "prose": "five novels by Jane Austen (public domain)",
    **{name: f"{name}, articles of Wikipedia (CC BY-SA 3.0 and GFDL)" for name in NAMES},
}
NOVELS = ("Emma", "Mansfield Park", "Northanger Abbey", "Pride and Prejudice", "Sense and Sensibility")
HELD_OUT_NOVEL = "Persuasion"
HELD_OUT_SHARE = 0.1  # of a text that has no validation split of its own
CODE_CHARACTERS = 2_500_000  # of the standard library; every Python has more
TOKENIZER_DOCUMENTS = 2000
SPECIAL = {
    "eos_token": "<end>",
    "pad_token": "<pad>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and others that training never sees."""

    train: Dataset
    held_out: Dataset


def read_texts(name: str, path: Path | None = None, characters: int = CODE_CHARACTERS) -> Texts:
    """The documents that `--text` names; a file's and the standard library's last tenth is held out if alone."""
    if name in NAMES:
        return Texts(*(load_wikitext(name, split, path=path) for split in ("train", "validation")))
    if name == "packages":
        return Texts(_dataset(package_sources(PACKAGES)), _dataset([stdlib_source(characters)]))
    if name == "prose":
        return Texts(_dataset(map(austen, NOVELS)), _dataset([austen(HELD_OUT_NOVEL)]))
    text = stdlib_source(characters) if name == "code" else read_text(name)
    cut = round(len(text) * (1 - HELD_OUT_SHARE))
    return Texts(_dataset([text[:cut]]), _dataset([text[cut:]]))


def tokenizer_of(args: argparse.Namespace, texts: Texts) -> Any:
    """The checkpoint's tokenizer, or byte-level BPE (arXiv:1909.03341) trained on the text.

    Raises:
        ModelUnavailableError: The checkpoint's tokenizer cannot be loaded.
    """
    if args.model:
        try:
            return tf.AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            remedy = "give a folder with a model and its tokenizer, or a name on the Hub that can be reached"
            raise ModelUnavailableError(f"cannot load {args.model} ({first}): {remedy}") from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = islice((row["text"] for row in texts.train), TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(documents, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=args.tokens, **SPECIAL)


def rows_of(texts: Texts, tokenizer: Any, args: argparse.Namespace, *, pack: bool) -> Texts:
    """Token rows of `--tokens`, `--held-out-rows` of them held out; packed for causal models, see `encode_dataset`."""
    options: dict[str, Any] = {"length": args.tokens, "pack": pack} | ({"pad_tail": False} if pack else {})
    train, held_out = (encode_dataset(one, tokenizer, **options) for one in (texts.train, texts.held_out))
    return Texts(train, held_out.select(range(min(args.held_out_rows, len(held_out)))))


def _dataset(documents: Iterable[str]) -> Dataset:
    return Dataset.from_dict({"text": list(documents)})
