"""A progress bar on stderr, so that stdout carries the figures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Told how much more is done.
Advance = Callable[[int], None]


@contextmanager
def bar(label: str, total: int) -> Iterator[Advance]:
    """A bar of `total` steps while the block runs; nothing at all when there are none."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not total) as progress:
        task = progress.add_task(label, total=total)
        yield lambda steps: progress.advance(task, steps)
