"""Tenants, API keys, audit trails, deletion receipts and usage, as the client shows them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from memsvc.client.convert import moment
from memsvc.v1 import admin_service_pb2 as admin


class Scope(StrEnum):
    """What an API key may do; each includes those before it."""

    READ = "read"
    READ_WRITE = "read-write"
    ADMIN = "admin"


@dataclass(frozen=True)
class Tenant:
    """Unit of isolation, quota and keys. default_model: of its memories; empty: the server's."""

    name: str
    display_name: str
    create_time: datetime | None
    default_model: str = ""


@dataclass(frozen=True)
class ApiKey:
    """An API key without its secret.

    revoke_time: may lie ahead, after a rotation. memories: names of those it reaches;
    empty: all of its tenant's. operator: it manages all tenants.
    """

    name: str
    display_name: str
    scope: Scope
    create_time: datetime | None
    expire_time: datetime | None
    revoke_time: datetime | None
    memories: tuple[str, ...] = ()
    operator: bool = False


@dataclass(frozen=True)
class CreatedApiKey:
    """A new key with its secret, which the server shows this once."""

    api_key: ApiKey
    secret: str = field(repr=False)


@dataclass(frozen=True)
class RotatedApiKey:
    """A new key with its secret, shown this once, and the old one with its end."""

    api_key: ApiKey
    secret: str = field(repr=False)
    previous: ApiKey


@dataclass(frozen=True)
class DeletionReceipt:
    """What one deletion destroyed.

    memory_uid: empty for what was left of a tenant. documents: runs of numbers, "1-3,7"; empty
    for the whole memory. receipt: the signed proof; the other fields repeat what it says.
    shared: runs of the documents that a fork still shows.
    """

    name: str
    issue_time: datetime | None
    memory_uid: str
    documents: str
    texts: int
    blocks: int
    workers_wiped: int
    workers_owed: int
    receipt: bytes
    shared: str = ""


@dataclass(frozen=True)
class AuditEvent:
    """One entry of an audit trail. outcome: "STARTED", then "OK" or why it failed."""

    name: str
    sequence: int
    time: datetime | None
    actor: str
    action: str
    resource: str
    outcome: str
    digest: str


@dataclass(frozen=True)
class TenantUsage:
    """What a tenant holds and has used."""

    name: str
    memories: int
    documents: int
    text_bytes: int
    block_bytes: int
    queries: int
    question_tokens: int
    answer_tokens: int
    encoded_tokens: int


def tenant(message: admin.Tenant) -> Tenant:
    """A tenant resource."""
    return Tenant(
        message.name,
        message.display_name,
        moment(message.create_time if message.HasField("create_time") else None),
        message.default_model,
    )


_SCOPES = {
    admin.READ: Scope.READ,
    admin.READ_WRITE: Scope.READ_WRITE,
    admin.ADMIN: Scope.ADMIN,
}


def scope_to_wire(scope: Scope) -> admin.Scope.ValueType:
    """The wire's value of a scope."""
    return admin.Scope.Value(scope.name)


def api_key(message: admin.ApiKey) -> ApiKey:
    """A key without its secret; an unknown scope counts as the least."""
    return ApiKey(
        name=message.name,
        display_name=message.display_name,
        scope=_SCOPES.get(message.scope, Scope.READ),
        create_time=moment(message.create_time if message.HasField("create_time") else None),
        expire_time=moment(message.expire_time if message.HasField("expire_time") else None),
        revoke_time=moment(message.revoke_time if message.HasField("revoke_time") else None),
        memories=tuple(message.memories),
        operator=message.operator,
    )


def audit_event(message: admin.AuditEvent) -> AuditEvent:
    """One entry of an audit trail."""
    return AuditEvent(
        name=message.name,
        sequence=message.sequence,
        time=moment(message.time if message.HasField("time") else None),
        actor=message.actor,
        action=message.action,
        resource=message.resource,
        outcome=message.outcome,
        digest=message.digest,
    )


def deletion_receipt(message: admin.DeletionReceipt) -> DeletionReceipt:
    """What one deletion destroyed."""
    return DeletionReceipt(
        name=message.name,
        issue_time=moment(message.issue_time if message.HasField("issue_time") else None),
        memory_uid=message.memory_uid,
        documents=message.documents,
        texts=message.texts,
        blocks=message.blocks,
        workers_wiped=message.workers_wiped,
        workers_owed=message.workers_owed,
        receipt=message.receipt,
        shared=message.shared,
    )


def usage(message: admin.TenantUsage) -> TenantUsage:
    """What a tenant holds and has used."""
    return TenantUsage(
        name=message.name,
        memories=message.memories,
        documents=message.documents,
        text_bytes=message.text_bytes,
        block_bytes=message.block_bytes,
        queries=message.queries,
        question_tokens=message.question_tokens,
        answer_tokens=message.answer_tokens,
        encoded_tokens=message.encoded_tokens,
    )
