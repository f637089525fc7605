"""WikiText through a language model, with dense and with tiled attention: perplexity by position, density, loss.

    pip install -e '.[demo,train]'
    python examples/wikitext_demo.py
    python examples/wikitext_demo.py --path FOLDER_WITH_WIKITEXT --tokens 8192 --tolerance 0.05

Without a network and without --path, Python's own manual stands in for WikiText; the output says so.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from _errors import explained

from aat_hf.data import DatasetUnavailableError, load_wikitext
from aat_hf.data.progress import notice
from aat_hf.demo import load_model
from aat_hf.metrics import load_metric


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name on the Hub (SmolLM2-135M-Instruct)")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of the text is read (4096)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--path", type=Path, help="WikiText on disk, as Parquet or text")
    args = parser.parse_args(argv)

    model, tokenizer = load_model(args.model, None)
    source, text = first_articles(args.path, characters=8 * args.tokens)
    inputs: dict[str, Any] = {
        "predictions": [text],
        "model": model,
        "tokenizer": tokenizer,
        "tolerance": args.tolerance,
        "max_tokens": args.tokens,
    }
    perplexity = load_metric("long_perplexity")
    dense = perplexity.compute(**inputs, implementation="sdpa")
    tiled = perplexity.compute(**inputs)
    density = load_metric("aat_density").compute(**inputs)
    infidelity = load_metric("aat_infidelity").compute(**inputs)

    print(f"{source}: {dense['tokens']} tokens predicted, tolerance {args.tolerance:g}")
    print(f"perplexity   dense {dense['perplexity']:.3f}   aat {tiled['perplexity']:.3f}")
    for number, pair in enumerate(zip(dense["by_position"], tiled["by_position"], strict=True), start=1):
        print(f"  quarter {number}  dense {pair[0]:.3f}   aat {pair[1]:.3f}")
    print("density      {density:.3f} (heads: p10 {density_p10:.3f}, p90 {density_p90:.3f})".format(**density))
    if infidelity["infidelity"] is None:
        print("infidelity   0: nothing was tiled; give more --tokens")
    else:
        print("infidelity   {infidelity:.4f} ± {half_width:.4f}".format(**infidelity))
        print("heads over the tolerance  {heads_over_tolerance:.3f}".format(**infidelity))


def first_articles(path: Path | None, characters: int) -> tuple[str, str]:
    """What was read, and the first articles of the test split, `characters` long or as long as it is."""
    try:
        return "WikiText-2", _joined(load_wikitext(split="test", path=path, streaming=True), characters)
    except DatasetUnavailableError as error:
        if path is not None:
            raise
        notice(f"{error}\nReading Python's manual in its place.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "wiki.test.raw"
        topics = sorted(pydoc_data.topics.topics.items())
        file.write_text("".join(f"\n = {name} = \n\n{text}\n" for name, text in topics), "utf-8")
        return "Python's manual", _joined(load_wikitext(split="test", path=file, streaming=True), characters)


def _joined(articles: Any, characters: int) -> str:
    pieces: list[str] = []
    for article in islice(articles, 10_000):
        pieces.append(article["text"])
        if sum(map(len, pieces)) >= characters:
            break
    return "\n".join(pieces)[:characters]


if __name__ == "__main__":
    with explained():
        main()
