"""Train, evaluate and build the example model aat-bert-base-mini: a small masked BERT, and its dense twin.

    pip install 'aat-hf[demo,train]'
    python model_cards/build_bert_base_mini.py

The defaults are meant for a GPU. The repository is then in build/aat-bert-base-mini/aat-bert-base-mini.
"""

from __future__ import annotations

from collections.abc import Sequence

import _building
import finetune_bert

NAME = "aat-bert-base-mini"


def main(argv: Sequence[str] | None = None) -> None:
    parser = _building.parser_of(
        __doc__, NAME, 5e-4, tokens=4096, steps=12120, exact_steps=12000, batch=4, layers=4, width=256, heads=4,
        vocabulary=4096, characters=10_000_000, held_out_rows=16,
    )  # fmt: skip
    args = _building.parse(parser, argv)
    trained = args.output / "trained"
    evaluation = ["--evaluate", *map(str, args.tolerances)]
    finetune_bert.main([*_building.training_options(args, trained), *evaluation])
    _building.publish(args, trained, NAME, "bert_base_mini.md")


if __name__ == "__main__":
    main()
