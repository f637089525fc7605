"""Progress of anything that takes seconds: a rich bar on a terminal, plain lines elsewhere.

Everything goes to stderr, so that what a command prints on stdout can be piped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[float], None]
"""Called with the work done so far, in the units of the bar's total."""


def notice(text: str) -> None:
    """Print one line for the user on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: float) -> Iterator[Update]:
    """Show the progress of one piece of work.

    Args:
        title: What is being done.
        total: The amount of work; 0 or less when nothing can be counted.

    Yields:
        A function to call with the amount done so far.
    """
    if sys.stderr.isatty():
        try:
            import rich  # noqa: F401  (only asked whether it is there)
        except ImportError:
            pass
        else:
            with _rich_progress(title, total) as update:
                yield update
            return
    with _plain_progress(title, total) as update:
        yield update


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep Transformers' own bars off the terminal while one of ours is up."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _rich_progress(title: str, total: float) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bars:
        task = bars.add_task(title, total=total if total > 0 else None)
        yield lambda done: bars.update(task, completed=done)
        bars.update(task, total=max(total, 1.0), completed=max(total, 1.0))


@contextmanager
def _plain_progress(title: str, total: float, every: float = 5.0) -> Iterator[Update]:
    start = last = time.monotonic()
    notice(f"{title} ...")

    def update(done: float) -> None:
        nonlocal last
        now = time.monotonic()
        if total > 0 and now - last >= every:
            last = now
            notice(f"  {title}: {min(1.0, done / total):.0%} after {now - start:.0f} s")

    yield update
    notice(f"  {title}: done in {time.monotonic() - start:.1f} s")
