"""A source document as JSON: one line, sorted keys, UTF-8; read back strictly.

The same text is the payload of a document record and a line of an archive.
Whatever `encode_document` did not write is refused: unknown or missing fields,
wrong types, repeated keys, numbers that are not integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import NoReturn, TypeVar, cast

from storage.documents import Conversation, Role, Source, TextSource, Turn
from storage.keys import MAX_NUMBER, check_number
from storage.store import StoredDocument

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_ROLES = frozenset(role.value for role in Role)
_T = TypeVar("_T")


class DocumentFormatError(ValueError):
    """Text that is no document of this format."""


def dump_json(value: object) -> bytes:
    """Canonical JSON: sorted keys, no spaces, UTF-8. Raises ValueError for lone surrogates."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def load_json(data: bytes) -> object:
    """Strict JSON. Raises DocumentFormatError, also for repeated keys and deep nesting."""
    try:
        return json.loads(
            data.decode(), object_pairs_hook=_object, parse_constant=_refuse, parse_float=_refuse
        )
    except RecursionError:
        raise DocumentFormatError("nested too deeply") from None
    except ValueError as error:  # Also UnicodeDecodeError and integers that are too long.
        raise DocumentFormatError(f"no JSON of this format: {error}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise DocumentFormatError("a key is repeated")
    return fields


def _refuse(text: str) -> NoReturn:
    raise DocumentFormatError(f"{text[:20]} is no integer")


class Fields:
    """Reads an object's fields by type; `close` refuses what was not read.

    Every method raises DocumentFormatError naming the field.
    """

    def __init__(self, value: object, what: str) -> None:
        if not isinstance(value, dict):
            raise DocumentFormatError(f"{what} is no object")
        self._fields = cast(dict[str, object], value)
        self._what = what

    def _take(self, name: str, kind: type[_T]) -> _T:
        value = self._fields.pop(name, None)
        # bool is an int to Python, not to this format.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DocumentFormatError(f"{self._what}.{name} is no {kind.__name__}")
        return value

    def has(self, name: str) -> bool:
        """Whether a field that may be left out is there, and was not read yet."""
        return name in self._fields

    def text(self, name: str) -> str:
        """A string, which must be sound Unicode."""
        return self._sound(self._take(name, str))

    def _sound(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DocumentFormatError(f"{self._what} holds a lone surrogate") from None
        return text

    def integer(self, name: str, low: int, high: int) -> int:
        """An integer with low <= value <= high."""
        value = self._take(name, int)
        if not low <= value <= high:
            raise DocumentFormatError(f"{self._what}.{name} does not lie in {low}..{high}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        return self._take(name, bool)

    def items(self, name: str, parse: Callable[[object], _T]) -> tuple[_T, ...]:
        """A list, each element through `parse`."""
        return tuple(parse(item) for item in self._take(name, list))

    def strings(self, name: str) -> dict[str, str]:
        """A map from string to string."""
        inner = Fields(self._take(name, dict), f"{self._what}.{name}")
        return {inner._sound(key): inner.text(key) for key in list(inner._fields)}

    def moment(self, name: str) -> datetime | None:
        """Microseconds since 1970 UTC, or null."""
        if name in self._fields and self._fields[name] is None:
            del self._fields[name]
            return None
        try:
            return _EPOCH + self._take(name, int) * _MICROSECOND
        except OverflowError:
            raise DocumentFormatError(f"{self._what}.{name} is no date") from None

    def child(self, name: str) -> Fields:
        """An object, to be closed by itself."""
        return Fields(self._take(name, dict), f"{self._what}.{name}")

    def close(self) -> None:
        """Refuses fields that nobody read."""
        if self._fields:
            raise DocumentFormatError(f"{self._what} has the unknown field {min(self._fields)!r}")


def _microseconds(moment: datetime | None) -> int | None:
    if moment is None:
        return None
    if moment.tzinfo is None:
        raise ValueError("occurred_at has no time zone")
    return (moment - _EPOCH) // _MICROSECOND


def _turn_fields(turn: Turn) -> Mapping[str, object]:
    return {
        "metadata": dict(turn.metadata),
        "occurred_at_us": _microseconds(turn.occurred_at),
        "role": turn.role.value,
        "session": turn.session,
        "speaker": turn.speaker,
        "text": turn.text,
    }


def _parse_turn(value: object) -> Turn:
    fields = Fields(value, "turn")
    role = fields.text("role")
    if role not in _ROLES:
        raise DocumentFormatError(f"turn.role is {role[:20]!r}")
    turn = Turn(
        role=Role(role),
        text=fields.text("text"),
        occurred_at=fields.moment("occurred_at_us"),
        speaker=fields.text("speaker"),
        session=fields.text("session"),
        metadata=fields.strings("metadata"),
    )
    fields.close()
    return turn


def _source_fields(source: Source) -> Mapping[str, object]:
    if isinstance(source, Conversation):
        return {"turns": [_turn_fields(turn) for turn in source.turns]}
    return {
        "metadata": dict(source.metadata),
        "occurred_at_us": _microseconds(source.occurred_at),
        "text": source.text,
        "title": source.title,
    }


def encode_document(document: StoredDocument) -> bytes:
    """JSON of a document, without a line end.

    Raises ValueError for what cannot be written: lone surrogates, dates without a
    zone, a conversation without turns, a number below 1.
    """
    check_number(document.number)
    source = document.source
    if isinstance(source, Conversation) and not source.turns:
        raise ValueError("a conversation has at least one turn")
    name = "conversation" if isinstance(source, Conversation) else "text"
    return dump_json(
        {
            "created_at_us": document.created_at_us,
            "number": document.number,
            "revision": document.revision,
            name: _source_fields(source),
        }
    )


def decode_document(data: bytes) -> StoredDocument:
    """The document of one JSON text. Raises DocumentFormatError."""
    value = load_json(data)
    fields = Fields(value, "document")
    number = fields.integer("number", 1, MAX_NUMBER)
    revision = fields.integer("revision", 0, MAX_NUMBER)
    created = fields.integer("created_at_us", -MAX_NUMBER, MAX_NUMBER)
    source: Source
    if isinstance(value, dict) and "conversation" in value:
        inner = fields.child("conversation")
        source = Conversation(inner.items("turns", _parse_turn))
        if not source.turns:
            raise DocumentFormatError("conversation.turns is empty")
    else:
        inner = fields.child("text")
        source = TextSource(
            text=inner.text("text"),
            title=inner.text("title"),
            occurred_at=inner.moment("occurred_at_us"),
            metadata=inner.strings("metadata"),
        )
    inner.close()
    fields.close()
    return StoredDocument(number=number, revision=revision, created_at_us=created, source=source)
