"""A git checkout to packed sequences of code, and a language model's loss on them, dense and tiled.

    pip install -e '.[demo,train]'
    python examples/github_demo.py
    python examples/github_demo.py ~/src/project another/folder --tokens 8192 --any-license
    python examples/github_demo.py codeparrot/codeparrot-clean-valid

Without a source it reads the checkout it is part of.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _errors import explained

import aat_hf
from aat_hf.data import CodeFilters, encode_dataset, load_github
from aat_hf.data.code_filters import PERMISSIVE
from aat_hf.demo import load_model


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=[str(Path(__file__).parents[1])], help="folders, or Hub datasets")
    parser.add_argument("--model", help="folder or name on the Hub (SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=4096, help="length of a packed sequence (4096)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--any-license", action="store_true", help="keep files of every licence")
    args = parser.parse_args(argv)

    files = load_github(args.sources, filters=CodeFilters(licenses=None if args.any_license else PERMISSIVE))
    licenses = ", ".join(f"{count} {name}" for name, count in Counter(files["license"]).most_common())
    model, tokenizer = load_model(args.model, None)
    rows = encode_dataset(files, tokenizer, length=args.tokens).with_format("torch")
    row = {name: values.to(model.device) for name, values in rows[:1].items()}
    documents = int((row["position_ids"] == 0).sum())
    print(f"{len(files)} files ({licenses}) make {len(rows)} sequences of {args.tokens} tokens")
    print(f"the first one packs {documents} documents, which do not see each other")

    aat_hf.configure(model, tolerance=args.tolerance)
    dense = loss_of(model, row, "sdpa")
    with aat_hf.record(model) as report:
        tiled = loss_of(model, row, "aat")
    lost, half_width = report.infidelity
    print(f"loss         dense {dense:.4f}   aat {tiled:.4f}   ({tiled - dense:+.4f} nats per token)")
    print(f"density      {report.density:.3f}, tolerance {args.tolerance:g}")
    print("infidelity   0: nothing was tiled" if lost != lost else f"infidelity   {lost:.4f} ± {half_width:.4f}")


@torch.inference_mode()
def loss_of(model: Any, row: dict[str, torch.Tensor], implementation: str) -> float:
    """Mean negative log-likelihood of a packed sequence, nats per token."""
    model.set_attn_implementation(implementation)
    return float(model(**row, use_cache=False).loss)


if __name__ == "__main__":
    with explained():
        main()
