"""Which documents of a memory a question may choose from, by what was said in them.

A document may hold several turns, and is routed to as a whole. It matches when one of its
turns meets every condition at once: "Anna, in March" is a turn of Anna's in March, not a
document in which she spoke in April and somebody else in March. A text that is no
conversation counts as one turn without role and speaker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from storage.documents import Conversation, Role, Source


@dataclass(frozen=True)
class MetadataCondition:
    """A turn's metadata has the key, with one of the values; with none given, with any."""

    key: str
    values: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DocumentFilter:
    """Conditions, all of which must hold; an empty one always does. Strings match exactly.

    occurred_from is part of the range, occurred_before is not (both aware UTC). A turn of
    which it is not known when it was said lies in no range.
    """

    occurred_from: datetime | None = None
    occurred_before: datetime | None = None
    roles: frozenset[Role] = frozenset()
    speakers: frozenset[str] = frozenset()
    metadata: tuple[MetadataCondition, ...] = ()


@dataclass(frozen=True)
class Attributes:
    """What a filter looks at, of one turn. role: None and speaker: empty for none."""

    occurred_at: datetime | None
    role: Role | None
    speaker: str
    metadata: Mapping[str, str]


def attributes(source: Source) -> list[Attributes]:
    """Of every turn, in order."""
    if isinstance(source, Conversation):
        return [Attributes(t.occurred_at, t.role, t.speaker, t.metadata) for t in source.turns]
    return [Attributes(source.occurred_at, None, "", source.metadata)]


def matches(wanted: DocumentFilter, source: Source) -> bool:
    """Whether a document may be chosen."""
    return any(_meets(wanted, turn) for turn in attributes(source))


def _meets(wanted: DocumentFilter, turn: Attributes) -> bool:
    return (
        _in_range(wanted, turn.occurred_at)
        and (not wanted.roles or turn.role in wanted.roles)
        and (not wanted.speakers or turn.speaker in wanted.speakers)
        and all(
            condition.key in turn.metadata
            and (not condition.values or turn.metadata[condition.key] in condition.values)
            for condition in wanted.metadata
        )
    )


def _in_range(wanted: DocumentFilter, moment: datetime | None) -> bool:
    first, end = wanted.occurred_from, wanted.occurred_before
    if moment is None:
        return first is None and end is None
    return (first is None or moment >= first) and (end is None or moment < end)
