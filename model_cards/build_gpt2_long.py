"""Train, evaluate and build the example model aat-gpt2-long: a small GPT-2 of long context, and its dense twin.

    pip install 'aat-hf[demo,train,viz]'
    python model_cards/build_gpt2_long.py

The defaults are meant for a GPU. The repository is then in build/aat-gpt2-long/aat-gpt2-long.
"""

from __future__ import annotations

from collections.abc import Sequence

import _building
import finetune_gpt2

NAME = "aat-gpt2-long"


def main(argv: Sequence[str] | None = None) -> None:
    parser = _building.parser_of(
        __doc__, NAME, 1e-3, tokens=8192, steps=5100, exact_steps=5000, batch=4, layers=4, width=256, heads=4,
        vocabulary=4096, characters=10_000_000, held_out_rows=16, eval_buckets=8,
    )  # fmt: skip
    args = _building.parse(parser, argv)
    trained = args.output / "trained"
    finetune_gpt2.main([*_building.training_options(args, trained), "--compare"])
    options = ["--text", str(trained / "held_out.txt"), "--tokens", str(args.tokens), "--what", "predictions"]
    options += ["--buckets", str(args.eval_buckets), "--tolerances", *map(str, args.tolerances)]
    _building.run(["eval", "--model", str(trained), *options, "--out", str(trained / "eval")])
    _building.publish(args, trained, NAME, "gpt2_long.md")


if __name__ == "__main__":
    main()
