"""The catalog's tables, the same on SQLite and PostgreSQL.

Ids made here are 32 hex digits. Times are UTC microseconds as BIGINT. Labels
and KV layouts are JSON text that nothing queries into. Enumerations are text
with a check, so that a person reading the database needs no legend.

tenants ─┬─ api_keys, requests, usage, quotas, leases
         └─ memories ─┬─ documents, lineages, revisions
                      └─ encodings ── quarantined_documents
models, audit and servers stand alone: a model's encodings outlive its row's absence,
audit outlives the tenant, and a lease names a server that may be gone.
"""

from __future__ import annotations

from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)

from storage.catalog.rows import MemoryState, PackingMode, Scope

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

_UID = String(32)
_NAME = String(256)


def _one_of(column: str, values: type[StrEnum]) -> CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


tenants = Table(
    "tenants",
    metadata,
    Column("uid", _UID, primary_key=True),
    Column("tenant_id", _NAME, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    # Model of its memories that have none of their own. Empty: the server's default.
    Column("default_model_id", _NAME, nullable=False, server_default=text("''")),
    # When its deletion began; its keys open nothing from then on.
    Column("deleting_us", BigInteger),
    UniqueConstraint("tenant_id"),
    Index(None, "created_us", "uid"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", _NAME, primary_key=True),
    Column("tenant_uid", _UID, ForeignKey("tenants.uid", ondelete="CASCADE"), nullable=False),
    Column("display_name", Text, nullable=False),
    Column("scope", String(16), nullable=False),
    Column("operator", Boolean, nullable=False),
    Column("digest", LargeBinary, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("revoked_us", BigInteger),
    # {uid: memory id} as JSON; NULL for every memory of the tenant.
    Column("memories", Text),
    _one_of("scope", Scope),
    Index(None, "tenant_uid", "created_us", "key_id"),
)

memories = Table(
    "memories",
    metadata,
    Column("uid", _UID, primary_key=True),
    Column("tenant_uid", _UID, ForeignKey("tenants.uid"), nullable=False),
    Column("memory_id", _NAME, nullable=False),
    Column("display_name", Text, nullable=False),
    Column("labels", Text, nullable=False),
    Column("packing_mode", String(16), nullable=False),
    Column("window_turns", Integer, nullable=False),
    Column("max_document_bytes", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("revision", BigInteger, nullable=False),
    Column("last_number", BigInteger, nullable=False),
    Column("deletion_epoch", BigInteger, nullable=False),
    Column("document_count", BigInteger, nullable=False),
    Column("text_bytes", BigInteger, nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("updated_us", BigInteger, nullable=False),
    Column("version", BigInteger, nullable=False),
    # Who answers; empty until a model has been seen. Who takes over as soon as it is
    # complete; empty: nobody. Whether that was said of this memory itself.
    Column("default_model_id", _NAME, nullable=False, server_default=text("''")),
    Column("next_model_id", _NAME, nullable=False, server_default=text("''")),
    Column("own_model", Boolean, nullable=False, server_default=false()),
    # Seconds that a document is kept after it was added. NULL: for ever.
    Column("retention_s", BigInteger),
    # Of a fork: uid of the memory it was made from, which may be gone, and as of when.
    Column("forked_from", _UID),
    Column("forked_revision", BigInteger),
    # When it was deleted, of one that is left for the rows of documents that forks show.
    Column("purged_us", BigInteger),
    _one_of("packing_mode", PackingMode),
    _one_of("state", MemoryState),
    CheckConstraint("document_count >= 0 AND text_bytes >= 0", name="counters"),
    Index(None, "tenant_uid", "created_us", "uid"),
)
# A name is free again as soon as its memory is being deleted.
Index(
    "uq_memories_tenant_uid_memory_id",
    memories.c.tenant_uid,
    memories.c.memory_id,
    unique=True,
    sqlite_where=memories.c.state != text("'deleting'"),
    postgresql_where=memories.c.state != text("'deleting'"),
)
Index(
    "ix_memories_state_not_active",
    memories.c.state,
    sqlite_where=memories.c.state != text("'active'"),
    postgresql_where=memories.c.state != text("'active'"),
)

documents = Table(
    "documents",
    metadata,
    Column(
        "memory_uid",
        _UID,
        ForeignKey("memories.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("revision_added", BigInteger, nullable=False),
    # By which revision of this memory; 0 once that is done and others may show it (shown.py).
    Column("revision_removed", BigInteger),
    Column("created_us", BigInteger, nullable=False),
    Column("text_bytes", BigInteger, nullable=False),
    # Rows lie in key order: listing and pending are one range scan.
    sqlite_with_rowid=False,
)
Index(
    "ix_documents_removed",
    documents.c.memory_uid,
    documents.c.number,
    sqlite_where=documents.c.revision_removed.is_not(None),
    postgresql_where=documents.c.revision_removed.is_not(None),
)

# A fork shows the owner's documents from first_number to last_number.
lineages = Table(
    "lineages",
    metadata,
    Column(
        "memory_uid",
        _UID,
        ForeignKey("memories.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("first_number", BigInteger, primary_key=True, autoincrement=False),
    Column("owner_uid", _UID, ForeignKey("memories.uid"), nullable=False),
    Column("last_number", BigInteger, nullable=False),
    Index(None, "owner_uid"),
    sqlite_with_rowid=False,
)

revisions = Table(
    "revisions",
    metadata,
    Column(
        "memory_uid",
        _UID,
        ForeignKey("memories.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("created_us", BigInteger, nullable=False),
    Column("documents_added", BigInteger, nullable=False),
    Column("documents_removed", BigInteger, nullable=False),
    # The memory's last_number as of then.
    Column("last_number", BigInteger, nullable=False),
    Index(None, "memory_uid", "created_us", "revision"),
    sqlite_with_rowid=False,
)

encodings = Table(
    "encodings",
    metadata,
    Column(
        "memory_uid",
        _UID,
        ForeignKey("memories.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("model_id", _NAME, primary_key=True),
    Column("identity", String(128), nullable=False),
    Column("encoded_number", BigInteger, nullable=False),
    # Live documents above encoded_number, kept with every write, so that
    # listings and backpressure never count documents.
    Column("pending_documents", BigInteger, nullable=False),
    Column("pending_bytes", BigInteger, nullable=False),
    # created_us of the first pending document; NULL when none is.
    Column("waiting_since_us", BigInteger),
    Column("quarantined_documents", BigInteger, nullable=False),
    Column("quarantined_bytes", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("failure", Text, nullable=False),
    # Has caught up since it was attached or its weights were replaced.
    Column("complete", Boolean, nullable=False, server_default=false()),
    CheckConstraint("pending_documents >= 0 AND pending_bytes >= 0", name="pending"),
    CheckConstraint("quarantined_documents >= 0", name="quarantined"),
    CheckConstraint("tokens >= 0 AND bytes >= 0", name="sizes"),
    sqlite_with_rowid=False,
)
Index(
    "ix_encodings_waiting",
    encodings.c.model_id,
    encodings.c.waiting_since_us,
    sqlite_where=encodings.c.pending_documents > text("0"),
    postgresql_where=encodings.c.pending_documents > text("0"),
)

quarantined_documents = Table(
    "quarantined_documents",
    metadata,
    Column("memory_uid", _UID, primary_key=True),
    Column("model_id", _NAME, primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("text_bytes", BigInteger, nullable=False),
    Column("reason", Text, nullable=False),
    ForeignKeyConstraint(
        ["memory_uid", "model_id"],
        ["encodings.memory_uid", "encodings.model_id"],
        ondelete="CASCADE",
    ),
)

models = Table(
    "models",
    metadata,
    Column("model_id", _NAME, primary_key=True),
    Column("display_name", Text, nullable=False),
    Column("identity", String(128), nullable=False),
    Column("layout", Text, nullable=False),
    Column("max_document_tokens", Integer, nullable=False),
    Column("max_question_tokens", Integer, nullable=False),
    Column("max_answer_tokens", Integer, nullable=False),
    Column("is_default", Boolean, nullable=False),
    Column("last_seen_us", BigInteger, nullable=False),
)

requests = Table(
    "requests",
    metadata,
    Column(
        "tenant_uid",
        _UID,
        ForeignKey("tenants.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("request_id", _NAME, primary_key=True),
    Column("method", String(128), nullable=False),
    Column("fingerprint", LargeBinary, nullable=False),
    Column("reply", LargeBinary, nullable=False),
    # Of the memory that was written to; empty for none. It may be gone.
    Column("memory_uid", _UID, nullable=False, server_default=text("''")),
    Column("created_us", BigInteger, nullable=False),
    Index(None, "created_us"),
)

# Server processes that share the catalog. place: host and data folder; the lock of another
# server at the same place says whether it lives. expires_us: by the database's clock.
servers = Table(
    "servers",
    metadata,
    Column("uid", _UID, primary_key=True),
    Column("place", Text, nullable=False),
    Column("expires_us", BigInteger, nullable=False),
)

# Who leads a tenant. The lease lives as long as its server does. fence: counts the
# changes of hands; a write commits only while it is the one that its server was given.
leases = Table(
    "leases",
    metadata,
    Column(
        "tenant_uid",
        _UID,
        ForeignKey("tenants.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("server_uid", _UID, nullable=False),
    Column("fence", BigInteger, nullable=False),
    Index(None, "server_uid"),
)

usage = Table(
    "usage",
    metadata,
    Column(
        "tenant_uid",
        _UID,
        ForeignKey("tenants.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("queries", BigInteger, nullable=False),
    Column("question_tokens", BigInteger, nullable=False),
    Column("answer_tokens", BigInteger, nullable=False),
    Column("encoded_tokens", BigInteger, nullable=False),
)

quotas = Table(
    "quotas",
    metadata,
    Column(
        "tenant_uid",
        _UID,
        ForeignKey("tenants.uid", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("name", String(64), primary_key=True),
    # "limit" is a keyword of SQL.
    Column("most", BigInteger, nullable=False),
    CheckConstraint("most > 0", name="most"),
)

audit = Table(
    "audit",
    metadata,
    Column(
        "id",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    Column("at_us", BigInteger, nullable=False),
    Column("tenant_uid", _UID, nullable=False),
    Column("actor", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("resource", Text, nullable=False),
    # Numbers a tenant's entries from 1; NULL for those from before there was a chain.
    Column("sequence", BigInteger),
    Column("outcome", Text, nullable=False, server_default=text("''")),
    Column("digest", LargeBinary),
    Index(None, "tenant_uid", "id"),
    Index(None, "tenant_uid", "sequence", unique=True),
)
