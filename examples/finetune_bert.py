"""Fine-tune a masked language model with tiled attention, and its dense twin beside it.

    pip install -e '.[demo,train]'
    python examples/finetune_bert.py --model model_cards/aat-bert-base-mini --compare
    python examples/finetune_bert.py --compare
    python examples/finetune_bert.py --text wikitext-2-raw-v1 --model google-bert/bert-base-uncased --tokens 512
    python examples/finetune_bert.py --evaluate 0.1 0.05 0.02 --output out

The first goes on from a model of this repository, on Python's own source, offline. Without --model a small new BERT is
trained: its heads look everywhere, so that exact attention is faster, and taken. Either takes a few minutes on a CPU.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from _errors import explained
from _finetuning import Outcome, finetune, is_first, parse, parser_of, say
from _texts import read_texts, tokenizer_of
from tokenizers import processors

import aat_hf


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--positions", type=int, help="of a new model; longer rows can follow (--tokens)")
    parser.add_argument(
        "--evaluate", type=float, nargs="+", default=[], metavar="TOLERANCE",
        help="evaluate the trained model densely and with each of these; in OUTPUT/eval/masked.csv",
    )  # fmt: skip
    args = parse(parser, argv)
    texts = read_texts(args.text, args.path, args.characters)
    tokenizer = tokenizer_of(args, texts)
    if not args.model:
        ends = [(one, tokenizer.convert_tokens_to_ids(one)) for one in (tokenizer.sep_token, tokenizer.cls_token)]
        tokenizer.backend_tokenizer.post_processor = processors.BertProcessing(*ends)
        tokenizer.model_max_length = positions_of(args)

    def make(attention: str) -> Any:
        return load(args.model, attention) if args.model else new(args, tokenizer, attention)

    aat = finetune(args, make, texts, tokenizer, tf.DataCollatorForLanguageModeling(tokenizer), pack=False)
    if args.evaluate:
        measured = evaluate(aat, args.evaluate, args.seed)
        for row in measured:
            lost = "0: nothing was tiled" if math.isnan(row["lost"]) else f"{row['lost']:.4f}"
            say("{attention:<12} loss {loss:.4f}   density {density:.3f}".format(**row) + f"   infidelity {lost}")
        if args.output is not None and is_first():
            write(args.output / "eval" / "masked.csv", measured)


def new(args: argparse.Namespace, tokenizer: Any, attention: str) -> aat_hf.AATBertForMaskedLM:
    config = aat_hf.AATBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions_of(args),
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.width,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = aat_hf.AATBertForMaskedLM._from_config(config, attn_implementation=attention)
    start_from_sinusoids(model.bert.embeddings.position_embeddings.weight.data, config.initializer_range)
    return model


def positions_of(args: argparse.Namespace) -> int:
    return args.positions or args.tokens


def start_from_sinusoids(weight: torch.Tensor, deviation: float) -> None:
    """Fill (positions, width) with sines and cosines (Vaswani et al. 2017, section 3.5) of a standard deviation.

    From random values each of thousands of positions would have to learn where it is.
    """
    positions, width = weight.shape
    rates = torch.exp(-math.log(10000) * torch.arange(0, width, 2) / width)
    angles = torch.arange(positions)[:, None] * rates
    weight.copy_(deviation * math.sqrt(2) * torch.stack([angles.sin(), angles.cos()], -1).flatten(1)[:, :width])


def load(name: str, attention: str) -> Any:
    how: dict[str, Any] = {"attn_implementation": attention, "dtype": torch.float32}
    if tf.AutoConfig.from_pretrained(name).model_type in ("bert", "aat-bert"):
        # Dropout of attention weights would need exact attention.
        return aat_hf.AATBertForMaskedLM.from_pretrained(name, attention_probs_dropout_prob=0.0, **how)
    return tf.AutoModelForMaskedLM.from_pretrained(name, **how)


def evaluate(trained: Outcome, tolerances: Sequence[float], seed: int) -> list[dict[str, Any]]:
    """The held-out loss with dense attention and with each tolerance, the same tokens masked every time."""
    model, rows = trained.trainer.model, []
    for tolerance in (None, *tolerances):
        model.set_attn_implementation("sdpa" if tolerance is None else "aat")
        aat_hf.configure(model, tolerance=tolerance or 0.0)
        tf.set_seed(seed)
        found = trained.trainer.evaluate()
        lost = found.get("eval_aat_infidelity", float("nan"))
        row = {"attention": "dense" if tolerance is None else f"aat {tolerance:g}", "loss": found["eval_loss"]}
        rows.append(row | {"density": found.get("eval_aat_density", 1.0), "lost": lost})
    return rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    with explained():
        main()
