"""Train, evaluate and build the example model aat-bert-base-mini: a small masked BERT, and its dense twin.

    pip install 'aat-hf[demo,train]'
    python model_cards/build_bert_base_mini.py

As BERT was trained (Devlin et al. 2019, appendix A.2), on short rows first: on long ones alone it stays at the
frequencies of tokens. The defaults are meant for a GPU. The repository is then in
build/aat-bert-base-mini/aat-bert-base-mini.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import _building
import finetune_bert

NAME = "aat-bert-base-mini"


def main(argv: Sequence[str] | None = None) -> None:
    parser = _building.parser_of(
        __doc__, NAME, 1e-3, tokens=4096, steps=3120, exact_steps=3000, batch=4, layers=4, width=256, heads=4,
        vocabulary=4096, characters=10_000_000, held_out_rows=16, short_tokens=512, short_steps=6000,
    )  # fmt: skip
    args = _building.parse(parser, argv)
    trained = args.output / "trained"
    short, batch = args.output / "short", args.batch * args.tokens // args.short_tokens
    options = dict(
        tokens=args.short_tokens, steps=args.short_steps, exact_steps=0, tolerance=0.0, batch=batch, weights="float32"
    )  # fmt: skip
    exact = argparse.Namespace(**vars(args) | options)
    finetune_bert.main([*_building.training_options(exact, short), "--positions", str(args.tokens)])
    more = ["--model", str(short), "--compare", "--evaluate", *map(str, args.tolerances)]
    finetune_bert.main([*_building.training_options(args, trained), *more])
    _building.publish(args, trained, NAME, "bert_base_mini.md")


if __name__ == "__main__":
    main()
