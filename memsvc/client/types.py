"""What the client takes and returns: plain frozen dataclasses.

Fields mean what protos/memsvc/v1/resources.proto says of the field of the same
name; times are aware UTC datetimes, None where the wire leaves them unset.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, Literal, TypeVar

Item = TypeVar("Item")


class Role(StrEnum):
    """Who speaks in a turn."""

    USER = "user"
    ASSISTANT = "assistant"
    SYSTEM = "system"
    TOOL = "tool"


class MemoryState(StrEnum):
    """Where a memory stands in its life."""

    UNKNOWN = "unknown"
    ACTIVE = "active"
    IMPORTING = "importing"
    DELETING = "deleting"


class EncodingState(StrEnum):
    """How far a model has read a memory."""

    UNKNOWN = "unknown"
    ENCODING = "encoding"
    READY = "ready"
    FAILED = "failed"


class PackingMode(StrEnum):
    """How the turns of one append become documents."""

    DEFAULT = "default"
    TURN = "turn"
    WINDOW = "window"
    SESSION = "session"


class DoneReason(StrEnum):
    """Why an answer ended."""

    UNKNOWN = "unknown"
    STOP = "stop"
    LENGTH = "length"
    ROUNDS = "rounds"


RoleName = Role | Literal["user", "assistant", "system", "tool"]


@dataclass(frozen=True)
class Turn:
    """One utterance of a conversation."""

    role: RoleName
    text: str
    occurred_at: datetime | None = None
    speaker: str = ""
    session: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversation:
    """The turns that packing put into one document, in order."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class TextSource:
    """A text that is not conversation."""

    text: str
    title: str = ""
    occurred_at: datetime | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """One immutable item of a memory; source is None in the basic view."""

    name: str
    number: int
    revision: int
    create_time: datetime | None
    text_bytes: int
    source: Conversation | TextSource | None


@dataclass(frozen=True)
class Packing:
    """A memory's packing policy; 0 stands for the server's default."""

    mode: PackingMode = PackingMode.DEFAULT
    window_turns: int = 0
    max_document_bytes: int = 0


@dataclass(frozen=True)
class Encoding:
    """How far one model has read a memory. complete: it has caught up since it was attached."""

    model: str
    state: EncodingState
    encoded_revision: int
    encoded_documents: int
    pending_documents: int
    tokens: int
    bytes: int
    quarantined_documents: int
    failure: str
    complete: bool = True


@dataclass(frozen=True)
class Memory:
    """A memory as it was when the call returned.

    default_model: answers when a call names none. next_model: takes over when it is complete.
    forked_from_uid: of the memory that it was forked from, empty for none; forked_revision: of
    that one, with which this one's own past begins.
    """

    name: str
    uid: str
    display_name: str
    labels: Mapping[str, str]
    packing: Packing
    state: MemoryState
    revision: int
    document_count: int
    text_bytes: int
    encodings: tuple[Encoding, ...]
    create_time: datetime | None
    update_time: datetime | None
    etag: str
    default_model: str = ""
    next_model: str = ""
    forked_from_uid: str = ""
    forked_revision: int = 0

    @property
    def id(self) -> str:
        """Last part of the name."""
        return self.name.rpartition("/")[2]


@dataclass(frozen=True)
class Written:
    """What a write made. revision, given as at_least_revision, reads it back."""

    revision: int
    documents: tuple[str, ...]


@dataclass(frozen=True)
class LayerScore:
    """Rank (from 1) and score of a document in one routed layer."""

    layer: int
    rank: int
    score: float


@dataclass(frozen=True)
class RankedDocument:
    """A document that routing chose; scores compare within one reply only.

    score: what it is ranked by. routing_score, lexical_score: where that comes from, the
    routed layers and BM25 of the question's words.
    """

    document: str
    number: int
    score: float
    layers: tuple[LayerScore, ...]
    content: Document | None
    routing_score: float = 0.0
    lexical_score: float = 0.0


@dataclass(frozen=True)
class Generation:
    """How to answer; 0 stands for the server's or the model's own value.

    lexical_weight: share of the question's words in the choice of documents, 0 (routing
    alone) to 1; None for the model's own. prefer_latest: of documents that say about the
    same, the latest comes first.
    """

    max_answer_tokens: int = 0
    top_k: int = 0
    temperature: float = 0.0
    top_p: float = 0.0
    seed: int = 0
    max_rounds: int = 0
    lexical_weight: float | None = None
    prefer_latest: bool = False


@dataclass(frozen=True)
class Filter:
    """Which documents may be chosen: those with a turn that meets every condition.

    occurred_from is part of the range, occurred_before is not. roles, speakers: any one of
    them. metadata: all of the keys, each with the value, or any one of the values; with none,
    whatever it holds. What is left empty is no condition.
    """

    occurred_from: datetime | None = None
    occurred_before: datetime | None = None
    roles: Iterable[Role | str] = ()
    speakers: Iterable[str] = ()
    metadata: Mapping[str, str | Iterable[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Routing:
    """What one round's routing chose, best first. lexical_weight: share the words had."""

    round: int
    documents: tuple[RankedDocument, ...]
    lexical_weight: float = 0.0


@dataclass(frozen=True)
class Citation:
    """A document whose original text was put before the model."""

    document: str
    number: int
    round: int
    content: Document | None


@dataclass(frozen=True)
class TextDelta:
    """Whole characters; deltas joined are the answer."""

    text: str


@dataclass(frozen=True)
class Usage:
    """What an answer took; times in milliseconds."""

    question_tokens: int
    answer_tokens: int
    document_tokens: int
    routed_documents: int
    routed_chunks: int
    rounds: int
    queue_ms: float
    page_in_ms: float
    routing_ms: float
    time_to_first_token_ms: float
    total_ms: float
    lexical_ms: float = 0.0
    filter_ms: float = 0.0


@dataclass(frozen=True)
class Done:
    """The last event. revision: what the answer saw."""

    reason: DoneReason
    revision: int
    model: str


QueryEvent = Routing | Citation | TextDelta | Usage | Done


@dataclass(frozen=True)
class Answer:
    """All events of one query, gathered."""

    text: str
    citations: tuple[Citation, ...]
    routing: tuple[Routing, ...]
    usage: Usage | None
    done: Done


@dataclass(frozen=True)
class Retrieved:
    """Documents for a question, best first, and the revision the ranking saw.

    lexical_weight: share that the question's words had in the ranking.
    """

    documents: tuple[RankedDocument, ...]
    revision: int
    model: str
    lexical_weight: float = 0.0


@dataclass(frozen=True)
class Progress:
    """One message of a watch."""

    revision: int
    state: MemoryState
    encodings: tuple[Encoding, ...]
    default_model: str = ""
    next_model: str = ""

    @property
    def pending_documents(self) -> int:
        """Documents that some model has yet to read."""
        return sum(encoding.pending_documents for encoding in self.encodings)


@dataclass(frozen=True)
class Revision:
    """What one write made."""

    revision: int
    create_time: datetime | None
    documents_added: int
    documents_removed: int


@dataclass(frozen=True)
class ArchivePart:
    """A piece of an exported archive. total_bytes: the whole archive."""

    data: bytes
    total_bytes: int


@dataclass(frozen=True)
class Imported:
    """What an import made."""

    memory: Memory
    reused_blocks: int
    documents_to_encode: int


@dataclass(frozen=True)
class Forked:
    """What a fork made. documents_missing: held as of then, deleted since, and not in it."""

    memory: Memory
    documents_missing: int


@dataclass(frozen=True)
class Restored:
    """What a restore made: its revision, how many documents it deleted, and how many of those
    of then had been deleted before and do not come back.
    """

    revision: int
    documents_removed: int
    documents_missing: int


@dataclass(frozen=True)
class Page(Generic[Item]):
    """One page of a list; next_page_token is empty on the last."""

    items: tuple[Item, ...]
    next_page_token: str
