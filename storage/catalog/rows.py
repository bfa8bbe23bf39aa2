"""What the catalog returns: frozen rows. Times are UTC microseconds since 1970."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from storage.layout import KVLayout

#: Where a listing goes on: (created_us, id) of the last row seen, or (0, id)
#: where a listing is ordered by id. Opaque to callers.
Cursor = tuple[int, str]


class Scope(StrEnum):
    """What an API key may do; each includes the one before it."""

    READ = "read"
    READ_WRITE = "read_write"
    ADMIN = "admin"


class PackingMode(StrEnum):
    """How the turns of one append become documents."""

    TURN = "turn"
    WINDOW = "window"
    SESSION = "session"


class MemoryState(StrEnum):
    """Where a memory stands in its life."""

    ACTIVE = "active"
    IMPORTING = "importing"
    DELETING = "deleting"


class EncodingState(StrEnum):
    """READY: nothing of the memory's revision waits. FAILED: stopped, see failure."""

    ENCODING = "encoding"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class TenantRow:
    """A unit of isolation. uid: 32 hex digits, never reused; tenant_id: its name.

    default_model_id: of its memories that have none of their own; empty: the server's default.
    deleting_us: when its deletion began; None for a tenant that stays.
    """

    uid: str
    tenant_id: str
    display_name: str
    created_us: int
    default_model_id: str = ""
    deleting_us: int | None = None


@dataclass(frozen=True)
class ApiKeyRow:
    """A credential. digest: HMAC-SHA-256 of its secret; the secret is nowhere.

    revoked_us: may lie ahead, after a rotation.
    memories: ids by uid of the memories it reaches, the deleted ones included;
    None for all of its tenant's.
    """

    key_id: str
    tenant_uid: str
    tenant_id: str
    display_name: str
    scope: Scope
    operator: bool
    digest: bytes
    created_us: int
    expires_us: int | None
    revoked_us: int | None
    memories: Mapping[str, str] | None


@dataclass(frozen=True)
class Packing:
    """A memory's packing policy; fixed when the memory is created."""

    mode: PackingMode
    window_turns: int
    max_document_bytes: int


@dataclass(frozen=True)
class MemoryRow:
    """A memory.

    revision: +1 with every write. last_number: highest document number ever
    allocated. deletion_epoch: +1 whenever blocks below last_number went or are made
    again, so that a worker knows its copy is stale. version: +1 with every change of
    the row, for etags. document_count and text_bytes count live documents only.
    default_model_id: who answers when a question names none, empty until one was seen.
    retention_s: seconds that a document is kept after it was added; None: for ever.
    next_model_id: who takes over as soon as its encoding is complete, empty for
    nobody. own_model: whether these were chosen for this memory, or follow the
    tenant's and the server's default. forked_from: uid of the memory that it was forked
    from, empty for none; forked_revision: as of which revision, where its own past begins.
    """

    uid: str
    tenant_uid: str
    memory_id: str
    display_name: str
    labels: Mapping[str, str]
    packing: Packing
    state: MemoryState
    revision: int
    last_number: int
    deletion_epoch: int
    document_count: int
    text_bytes: int
    created_us: int
    updated_us: int
    version: int
    default_model_id: str = ""
    retention_s: int | None = None
    next_model_id: str = ""
    own_model: bool = False
    forked_from: str = ""
    forked_revision: int = 0


@dataclass(frozen=True)
class DocumentRow:
    """A live document. text_bytes: UTF-8 bytes of its source text."""

    number: int
    revision_added: int
    created_us: int
    text_bytes: int


@dataclass(frozen=True)
class RevisionRow:
    """What one write made. last_number: highest document number allocated up to then."""

    memory_uid: str
    revision: int
    created_us: int
    documents_added: int
    documents_removed: int
    last_number: int


@dataclass(frozen=True)
class EncodingRow:
    """All blocks of one memory under one model.

    encoded_number: watermark; every live document up to it has a block or is
    quarantined. encoded_revision: every document added at or before it is at or
    below the watermark. tokens and bytes are sums over encoded documents; after
    a deletion or a rewind they are scaled by source bytes, so an estimate.
    failure is empty unless state is FAILED. complete: has caught up since it was
    attached or its weights were replaced; new documents do not take that back.
    """

    memory_uid: str
    model_id: str
    identity: str
    state: EncodingState
    encoded_number: int
    encoded_revision: int
    encoded_documents: int
    pending_documents: int
    quarantined_documents: int
    tokens: int
    bytes: int
    failure: str
    complete: bool = True


@dataclass(frozen=True)
class ModelRow:
    """A model that some worker has served. At most one is the default."""

    model_id: str
    display_name: str
    identity: str
    layout: KVLayout
    max_document_tokens: int
    max_question_tokens: int
    max_answer_tokens: int
    default: bool
    last_seen_us: int


@dataclass(frozen=True)
class UsageRow:
    """What a tenant holds now (first four) and has used since it was made."""

    memories: int
    documents: int
    text_bytes: int
    block_bytes: int
    queries: int
    question_tokens: int
    answer_tokens: int
    encoded_tokens: int


@dataclass(frozen=True)
class AuditRow:
    """Who did what, when, and how it ended. actor: a key id, or a command's name.

    sequence: from 1, without gaps, within the tenant. digest: see audit_chain.
    """

    sequence: int
    at_us: int
    tenant_uid: str
    actor: str
    action: str
    resource: str
    outcome: str
    digest: bytes


@dataclass(frozen=True)
class RequestRecord:
    """An answered write. fingerprint: SHA-256 of its payload; reply: its answer's bytes.

    memory_uid: of the memory that was written to, since its name may be another's later;
    empty for a write to none, and for one recorded before that was kept.
    """

    request_id: str
    method: str
    fingerprint: bytes
    reply: bytes
    memory_uid: str = ""

    def answers(self, other: RequestRecord) -> bool:
        """Whether the other one is a repetition of this write."""
        same = (self.method, self.fingerprint) == (other.method, other.fingerprint)
        uids = {self.memory_uid, other.memory_uid} - {""}
        return same and len(uids) < 2
