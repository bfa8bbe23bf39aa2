"""What commands print: for people with rich, or as JSON. Progress goes to stderr.

With --json, stdout carries one JSON object, or one per line where a command
gives many, and nothing else; errors are a JSON object on stderr.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from memsvc.client import ApiError, MemsvcError


def to_json(value: object) -> str:
    """Dataclasses, times and paths as JSON has them. Times are RFC 3339 in UTC."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def moment(value: datetime | None) -> str:
    """A time for people: UTC, to the minute; a dash for none."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M}" if value else "-"


def size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


class Output:
    """Where a command's words go."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(highlight=False, soft_wrap=True)
        self.errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def json(self, value: object) -> None:
        """One JSON object on one line."""
        sys.stdout.write(to_json(value) + "\n")
        sys.stdout.flush()

    def text(self, text: str = "", *, end: str = "\n") -> None:
        """Words for people, exactly as they are: no markup is read from them."""
        self.console.print(text, end=end, markup=False)

    def result(self, value: object, text: str) -> None:
        """A command's one result."""
        if self.as_json:
            self.json(value)
        else:
            self.text(text)

    def fields(self, value: object, rows: Sequence[tuple[str, str]]) -> None:
        """One thing with its properties."""
        if self.as_json:
            self.json(value)
            return
        table = Table.grid(padding=(0, 2))
        for name, content in rows:
            table.add_row(name, content)
        self._table(table)

    def rows(
        self,
        items: Iterable[object],
        columns: Sequence[str],
        cells: Iterable[Sequence[str]],
        empty: str,
    ) -> None:
        """Many things: JSON lines, or a table. `items` and `cells` are read one after the other."""
        if self.as_json:
            for item in items:
                self.json(item)
            return
        table = Table(*columns, box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for row in cells:
            table.add_row(*row)
        if table.row_count:
            self._table(table)
        else:
            self.text(empty)

    def _table(self, table: Table) -> None:
        for column in table.columns:
            column.overflow = "fold"
        wide = self.console if self.console.is_terminal else Console(width=200, highlight=False)
        wide.print(table, markup=False)

    def note(self, text: str) -> None:
        """A remark on stderr; none with --json."""
        if not self.as_json:
            self.errors.print(text, markup=False)

    def failure(self, error: MemsvcError) -> None:
        """What went wrong, on stderr."""
        if not self.as_json:
            self.errors.print(f"Error: {error}", markup=False)
            if isinstance(error, ApiError):
                for key, value in sorted(error.metadata.items()):
                    self.errors.print(f"  {key}: {value}", markup=False)
            return
        described: dict[str, object] = {"message": str(error), "kind": type(error).__name__}
        if isinstance(error, ApiError):
            described |= {
                "code": error.code,
                "reason": error.reason,
                "field": error.field,
                "metadata": error.metadata,
                "retry_after_s": error.retry_after_s,
            }
        sys.stderr.write(to_json({"error": described}) + "\n")

    @contextmanager
    def progress(self, title: str, total: float | None) -> Iterator[Bar]:
        """A bar on stderr, shown only on a terminal and without --json."""
        bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=self.errors,
            transient=True,
            disable=self.as_json or not self.errors.is_terminal,
        )
        with bars:
            yield Bar(bars, bars.add_task(title, total=total))


class Bar:
    """One running bar."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def at(self, completed: float, total: float | None = None) -> None:
        """Says how far the work is, and of how much when that has become known."""
        self._bars.update(self._task, completed=completed, total=total)

    def advance(self, amount: float) -> None:
        """Says that this much more is done."""
        self._bars.advance(self._task, amount)
