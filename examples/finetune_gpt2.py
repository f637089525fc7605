"""Fine-tune a causal language model with tiled attention, and its dense twin beside it.

    pip install -e '.[demo,train]'
    python examples/finetune_gpt2.py --model model_cards/aat-gpt2-long --compare
    python examples/finetune_gpt2.py --compare
    python examples/finetune_gpt2.py --text wikitext-2-raw-v1 --model openai-community/gpt2 --tokens 1024 --output out

The first goes on from a model of this repository, on Python's own source, offline. Without --model a small new GPT-2 is
trained: its heads look everywhere, so that exact attention is faster, and taken. Either takes a few minutes on a CPU.
The callback's numbers are in out/trainer_state.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import transformers as tf
from _errors import explained
from _finetuning import finetune, parse, parser_of
from _texts import read_texts, tokenizer_of

import aat_hf


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser_of(__doc__), argv)
    texts = read_texts(args.text, args.path, args.characters)
    tokenizer = tokenizer_of(args, texts)

    def make(attention: str) -> Any:
        return load(args.model, attention) if args.model else new(args, tokenizer, attention)

    finetune(args, make, texts, tokenizer, tf.default_data_collator, pack=True)


def new(args: argparse.Namespace, tokenizer: Any, attention: str) -> aat_hf.AATGPT2LMHeadModel:
    config = aat_hf.AATGPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.tokens,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return aat_hf.AATGPT2LMHeadModel._from_config(config, attn_implementation=attention)


def load(name: str, attention: str) -> Any:
    how: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if tf.AutoConfig.from_pretrained(name).model_type in ("gpt2", "aat-gpt2"):
        # Dropout of attention weights would need exact attention.
        return aat_hf.AATGPT2LMHeadModel.from_pretrained(name, attn_pdrop=0.0, **how)
    return tf.AutoModelForCausalLM.from_pretrained(name, **how)


if __name__ == "__main__":
    with explained():
        main()
