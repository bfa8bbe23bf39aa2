"""Values of a JSON document that know where in it they are, and paths into it.

A path is names joined by dots; `[]` behind a name (or alone) goes through a list. The place of
a value is written the same way, with numbers: `[3].chat_messages[0].text`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from memsvc.client.errors import ImportFormatError

_SHOWN = 40


@dataclass(frozen=True)
class Value:
    """A JSON value and its place."""

    content: object
    place: str = ""

    def error(self, problem: str) -> ImportFormatError:
        """What is wrong at this place."""
        return ImportFormatError(problem, self.place or "the file")

    def has(self, path: str) -> bool:
        """Whether the first name of the path is there: for telling formats apart."""
        first = path.split(".", maxsplit=1)[0]
        if first == "":
            return True
        if first == "[]":
            return isinstance(self.content, list)
        return isinstance(self.content, dict) and first.removesuffix("[]") in self.content

    def child(self, name: str) -> Value | None:
        """A field; None where it is missing or null. Raises when this is no object."""
        if not isinstance(self.content, dict):
            raise self.error("is no object")
        found = self.content.get(name)
        # A name may be the dump's own.
        shown = name[:_SHOWN].encode(errors="replace").decode()
        place = f"{self.place}.{shown}" if self.place else shown
        return None if found is None else Value(found, place)

    def items(self) -> Iterator[Value]:
        """The elements of a list. Raises when this is none."""
        if not isinstance(self.content, list):
            raise self.error("is no list")
        for index, item in enumerate(self.content):
            yield Value(item, f"{self.place}[{index}]")

    def at(self, path: str) -> Iterator[Value]:
        """The values at a path: none where something on the way is missing or null."""
        name, _, rest = path.partition(".")
        if not name:
            yield self
            return
        through = name.endswith("[]")
        name = name.removesuffix("[]")
        found = self.child(name) if name else self
        if found is None:
            return
        for value in found.items() if through else (found,):
            yield from value.at(rest) if rest else (value,)

    def text(self) -> str:
        """Raises when this is no string."""
        if not isinstance(self.content, str):
            raise self.error("is no text")
        return self.content

    def time(self) -> datetime:
        """RFC 3339, or seconds since 1970; without a zone it is UTC. Raises when neither."""
        value = self.content
        try:
            if isinstance(value, int | float) and not isinstance(value, bool):
                if not math.isfinite(value):
                    raise self.error("is no time")
                return datetime.fromtimestamp(value, UTC)
            if isinstance(value, str):
                found = datetime.fromisoformat(value)
                return found if found.tzinfo else found.replace(tzinfo=UTC)
        except (ValueError, OverflowError, OSError):
            pass
        raise self.error(f"is no time: {str(value)[:_SHOWN]!r}")


def parse(data: bytes) -> Value:
    """A JSON document. Raises ImportFormatError naming line and column."""
    try:
        return Value(json.loads(data.decode("utf-8-sig")))
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ImportFormatError(f"no JSON: {error.msg}", where) from None
    except UnicodeDecodeError as error:
        raise ImportFormatError("no UTF-8", f"byte {error.start}") from None
    except (RecursionError, ValueError) as error:
        raise ImportFormatError(f"no JSON that is read here: {error}") from None
