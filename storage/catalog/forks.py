"""Forks: a memory that begins with what another one held.

Texts and blocks are shared in the store (storage/lineage.py), rows of documents in the
catalog (storage/catalog/shown.py): what a fork costs depends on neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, func, insert, literal, select
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import AlreadyExistsError, ConflictError, NotFoundError
from storage.catalog.memories import NOT_DELETING, memory_row, memory_values
from storage.catalog.progress import (
    complete_encoding,
    encoding_query,
    encoding_row,
    live_between,
    oldest_pending_us,
    scaled,
)
from storage.catalog.revisions import record_revision
from storage.catalog.rows import EncodingRow, MemoryRow, RequestRecord
from storage.catalog.shown import inherit
from storage.catalog.tables import (
    encodings,
    memories,
    quarantined_documents,
    revisions,
)

#: Makes the record of a fork's call: the child, its encodings, the documents it lacks.
Record = Callable[[MemoryRow, Sequence[EncodingRow], int], RequestRecord | None]


class Forks(CatalogPart):
    """Making a memory out of another one."""

    @writes
    async def commit_fork(
        self,
        parent: MemoryRow,
        child: MemoryRow,
        request: RequestRecord | None,
        record: Record,
        *,
        most: int = 0,
    ) -> MemoryRow:
        """Makes `child` visible: the parent's live documents up to child.last_number, as of
        child.revision, with encodings as far as the parent's are.

        parent: as the caller holds it, whose write lock it has. child: its uid, names,
        display name, labels, revision and last_number count. request: to find a first
        reply by. record: makes what is recorded, inside the transaction. most: how many
        memories the tenant may have with it; 0 is no limit.
        Raises ConflictError (the parent has moved on), NotFoundError (parent, tenant),
        AlreadyExistsError, LimitReachedError, RequestRepeatedError, RequestIdReusedError.
        """
        async with self._leading(tenant_uid=parent.tenant_uid) as connection:
            parent = await self._lock_parent(connection, parent, alone=bool(most))
            await self._refuse_repeated(connection, parent.tenant_uid, request)
            await self._refuse_more(connection, parent.tenant_uid, most)
            child = await self._add_memory(connection, parent, child)
            await inherit(connection, parent.uid, child.uid, child.last_number)
            for encoding in await _encodings_of(connection, parent):
                await _copy_encoding(connection, parent, child, encoding)
            missing = await _documents_at(connection, parent.uid, child.revision)
            missing = max(0, missing - child.document_count)
            found = select(memories).where(memories.c.uid == child.uid)
            child = memory_row((await connection.execute(found)).one())
            if child.revision:
                await record_revision(connection, child, added=child.document_count)
            query = encoding_query().where(encodings.c.memory_uid == child.uid)
            rows = await connection.execute(query.order_by(encodings.c.model_id))
            made = record(child, [encoding_row(row) for row in rows], missing)
            await self._record_request(connection, parent.tenant_uid, made)
        return child

    async def _lock_parent(
        self, connection: Statements, parent: MemoryRow, *, alone: bool
    ) -> MemoryRow:
        await self._keep_default_still(connection)
        await self._keep_tenant(connection, parent.tenant_uid, alone=alone)
        query = select(memories).where(memories.c.uid == parent.uid, NOT_DELETING)
        row = (await connection.execute(query.with_for_update())).one_or_none()
        if row is None:
            raise NotFoundError(f"no memory {parent.uid}")
        if row.revision != parent.revision:
            raise ConflictError(f"memory {parent.uid} is at revision {row.revision}")
        return memory_row(row)

    async def _add_memory(
        self, connection: Statements, parent: MemoryRow, child: MemoryRow
    ) -> MemoryRow:
        count, text_bytes = parent.document_count, parent.text_bytes
        if child.last_number < parent.last_number:
            count, text_bytes = await live_between(connection, parent.uid, 0, child.last_number)
        now = self._clock_us()
        child = replace(
            parent,
            uid=child.uid,
            memory_id=child.memory_id,
            display_name=child.display_name,
            labels=child.labels,
            revision=child.revision,
            last_number=child.last_number,
            deletion_epoch=0,
            document_count=count,
            text_bytes=text_bytes,
            created_us=now,
            updated_us=now,
            version=1,
            forked_from=parent.uid,
            forked_revision=child.revision,
        )
        try:
            await connection.execute(insert(memories).values(memory_values(child)))
        except IntegrityError as error:
            raise AlreadyExistsError(f"memory {child.memory_id} exists") from error
        return child

    @reads
    async def documents_at(self, memory_uid: str, revision: int) -> int:
        """How many documents the memory held at a revision, those deleted since included."""
        async with self._database.reading() as connection:
            return await _documents_at(connection, memory_uid, revision)


async def _documents_at(connection: Statements, memory_uid: str, revision: int) -> int:
    difference = revisions.c.documents_added - revisions.c.documents_removed
    query = select(func.coalesce(func.sum(difference), 0)).where(
        revisions.c.memory_uid == memory_uid, revisions.c.revision <= revision
    )
    return int((await connection.execute(query)).scalar_one())


async def _encodings_of(connection: Statements, parent: MemoryRow) -> Sequence[Row[Any]]:
    query = select(encodings).where(encodings.c.memory_uid == parent.uid)
    return (await connection.execute(query)).all()


async def _copy_encoding(
    connection: Statements, parent: MemoryRow, child: MemoryRow, encoding: Row[Any]
) -> None:
    """The parent's encoding as far as the child's documents go, with its quarantine."""
    watermark = min(encoding.encoded_number, child.last_number)
    waiting, waiting_bytes = await live_between(
        connection, parent.uid, watermark, child.last_number
    )
    place = (
        quarantined_documents.c.memory_uid == parent.uid,
        quarantined_documents.c.model_id == encoding.model_id,
        quarantined_documents.c.number <= child.last_number,
    )
    sizes = quarantined_documents.c.text_bytes
    query = select(func.count(), func.coalesce(func.sum(sizes), 0)).where(*place)
    aside, aside_bytes = map(int, tuple((await connection.execute(query)).one()))
    before = parent.text_bytes - encoding.pending_bytes - encoding.quarantined_bytes
    after = child.text_bytes - waiting_bytes - aside_bytes
    since = await oldest_pending_us(connection, parent.uid, watermark) if waiting else None
    values = {
        "memory_uid": child.uid,
        "model_id": encoding.model_id,
        "identity": encoding.identity,
        "encoded_number": watermark,
        "pending_documents": waiting,
        "pending_bytes": waiting_bytes,
        "waiting_since_us": since,
        "quarantined_documents": aside,
        "quarantined_bytes": aside_bytes,
        "tokens": scaled(encoding.tokens, after, before),
        "bytes": scaled(encoding.bytes, after, before),
        "failure": encoding.failure if waiting else "",
        "complete": encoding.complete,
    }
    await connection.execute(insert(encodings).values(values))
    columns = [c for c in quarantined_documents.c if c.name != "memory_uid"]
    copied = select(literal(child.uid), *columns).where(*place)
    names = ["memory_uid", *(column.name for column in columns)]
    await connection.execute(insert(quarantined_documents).from_select(names, copied))
    if not waiting and not encoding.complete:
        await complete_encoding(connection, child.uid, encoding.model_id)
