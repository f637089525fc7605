"""WikiText (Merity et al., 2016, arXiv:1609.07843): whole articles of Wikipedia, from the Hub or from local files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aat_hf.data.sources import DatasetUnavailableError, fingerprint_of, generated, load_files, load_hub

REPOSITORY = "Salesforce/wikitext"
NAMES = ("wikitext-2-raw-v1", "wikitext-2-v1", "wikitext-103-raw-v1", "wikitext-103-v1")
_TITLE = re.compile(r"^ = [^=].*[^=] = $|^ = [^=] = $")  # " = Title = "; sections have more signs: " = = Section = = "


def load_wikitext(
    name: str = "wikitext-2-raw-v1",
    split: str = "train",
    *,
    path: str | Path | None = None,
    articles: bool = True,
    streaming: bool = False,
    refresh: bool = False,
) -> Any:
    """One split of WikiText.

    Args:
        name: One of `NAMES`; "raw" ones keep every word, the others replace rare ones by <unk>.
        split: "train", "validation" or "test", or a part of one: "train[:10%]" (not when streaming).
        path: A Parquet or text file, or a folder with files such as `train-00000-of-00001.parquet` (as on the Hub,
            also below a folder called `name`) or `wiki.train.raw` (as first published). None: the Hub.
        articles: Join the lines of each article to one text; else one line a row, as on the Hub.
        streaming: Read while iterating, storing nothing.
        refresh: Download again, replacing a damaged copy in the cache.

    Returns:
        A `datasets.Dataset` (`IterableDataset` when streaming) with the column "text".

    Raises:
        DatasetUnavailableError: It does not exist, cannot be reached, is empty or damaged.
        ImportError: `datasets` is not installed.
    """
    if path is None:
        if name not in NAMES:
            raise DatasetUnavailableError(f"no WikiText {name!r}: choose one of {', '.join(NAMES)}")
        lines = load_hub(REPOSITORY, name, split=split, streaming=streaming, refresh=refresh)
    else:
        lines = load_files(_files(Path(path).expanduser(), name, split), split=split, streaming=streaming)
    if not streaming and "text" not in lines.column_names:
        raise DatasetUnavailableError(f"{path or name} has the columns {lines.column_names}: WikiText's is 'text'")
    if not articles:
        return lines
    fingerprint = "" if streaming else fingerprint_of("articles", lines._fingerprint)
    return generated(_rows, fingerprint, streaming=streaming, lines=lines)


def join_articles(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to articles: a heading of the first level, " = Title = ", between empty lines begins one.

    Lines before the first heading make up an article of their own. Only empty ones are left out.
    """
    article: list[str] = []
    blank = True
    for line in lines:
        line = line.removesuffix("\n")
        if blank and _TITLE.match(line):
            yield from _text(article)
            article = []
        article.append(line)
        blank = not line.strip()
    yield from _text(article)


def _text(article: list[str]) -> Iterator[str]:
    """The article without the empty lines around it, unless there is nothing else."""
    filled = [number for number, line in enumerate(article) if line.strip()]
    if filled:
        yield "\n".join(article[filled[0] : filled[-1] + 1]) + "\n"


def _rows(lines: Any) -> Iterator[dict[str, str]]:
    """Called by `datasets`, which stores what it yields."""
    return ({"text": article} for article in join_articles(row["text"] for row in lines))


def _files(path: Path, name: str, split: str) -> list[Path]:
    """The files of one split."""
    if not path.is_dir():
        return [path]
    wanted = split.split("[")[0]
    old = "valid" if wanted == "validation" else wanted
    patterns = (f"{wanted}-*.parquet", f"{wanted}.parquet", f"wiki.{old}.raw", f"wiki.{old}.tokens", f"{wanted}.txt")
    for folder in (path / name, path):
        for pattern in patterns:
            if found := sorted(folder.glob(pattern)):
                return found
    raise DatasetUnavailableError(f"{path} has no files of split {wanted!r}: expected one of {', '.join(patterns)}")
