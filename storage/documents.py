"""Source documents: the truth of a memory, and how they read to a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum

#: Part of every model identity: a change of `render` makes old blocks foreign.
RENDER_VERSION = 1


class Role(StrEnum):
    """Who speaks in a turn."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"


@dataclass(frozen=True)
class Turn:
    """One utterance. occurred_at is aware UTC or None."""

    role: Role
    text: str
    occurred_at: datetime | None = None
    speaker: str = ""
    session: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """The turns that packing put into one document, in order; never empty."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class TextSource:
    """A text that is not conversation."""

    text: str
    title: str = ""
    occurred_at: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


Source = Conversation | TextSource


def _date(moment: datetime | None) -> str:
    return f" ({moment.astimezone(UTC):%-d %B %Y, %H:%M})" if moment else ""


def render(source: Source) -> str:
    """The text that a model reads for a document, dates and speakers included."""
    if isinstance(source, TextSource):
        head = f"{source.title}{_date(source.occurred_at)}".strip()
        return f"{head}\n{source.text}" if head else source.text
    return "\n".join(
        f"{turn.speaker or turn.role.value}{_date(turn.occurred_at)}: {turn.text}"
        for turn in source.turns
    )


def text_bytes(source: Source) -> int:
    """UTF-8 bytes of the source text alone."""
    if isinstance(source, TextSource):
        return len(source.text.encode())
    return sum(len(turn.text.encode()) for turn in source.turns)
