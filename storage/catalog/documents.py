"""Writes to a memory, and its live documents. Every write is one transaction.

The caller holds the memory's write lock; expected_revision guards against one
that does not. A call that has committed before is told apart from a conflict by
its request id, whichever of the two the database notices first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Row,
    String,
    bindparam,
    delete,
    insert,
    select,
    text,
    update,
)

from storage.catalog.base import CatalogPart, page_size, reads, slices, writes
from storage.catalog.connections import Database, Statements
from storage.catalog.errors import ConflictError, NotFoundError
from storage.catalog.memories import CHANGED, NOT_DELETING, memory_row
from storage.catalog.progress import Removed, grow_pending, shrink_encodings
from storage.catalog.revisions import record_revision
from storage.catalog.rows import DocumentRow, MemoryRow, RequestRecord
from storage.catalog.shown import MAX_NUMBER, REMOVED, mark_removed, settle, shown
from storage.catalog.tables import documents as _table
from storage.catalog.tables import memories, requests

_COLUMNS = (
    _table.c.number,
    _table.c.revision_added,
    _table.c.created_us,
    _table.c.text_bytes,
)

# One statement and round trip on PostgreSQL however many documents; asyncpg's
# executemany also does not notice a connection that breaks under it.
_INSERT_ARRAYS = text(
    "INSERT INTO documents (memory_uid, number, revision_added, created_us, text_bytes) "
    "SELECT :memory_uid, * FROM unnest(:numbers, :revisions, :times, :sizes)"
).bindparams(
    bindparam("memory_uid", type_=String),
    *(
        bindparam(name, type_=ARRAY(BigInteger))
        for name in ("numbers", "revisions", "times", "sizes")
    ),
)


def _document(row: Row[*tuple[Any, ...]]) -> DocumentRow:
    return DocumentRow(**row._mapping)


def _check_new(added: Sequence[DocumentRow], revision: int) -> None:
    """Raises ValueError unless documents ascend from 1 and belong to that revision."""
    if not added:
        raise ValueError("an append needs at least one document")
    last = 0
    for document in added:
        if document.number <= last:
            raise ValueError(f"document {document.number} follows {last}")
        if document.revision_added != revision:
            raise ValueError(f"document {document.number} is not of revision {revision}")
        last = document.number


async def insert_documents(
    database: Database, connection: Statements, memory_uid: str, added: Sequence[DocumentRow]
) -> None:
    """Rows of new documents, inside the caller's transaction."""
    if database.is_sqlite:
        rows = [{"memory_uid": memory_uid, **vars(document)} for document in added]
        await connection.execute(insert(_table), rows)
        return
    await connection.execute(
        _INSERT_ARRAYS,
        {
            "memory_uid": memory_uid,
            "numbers": [document.number for document in added],
            "revisions": [document.revision_added for document in added],
            "times": [document.created_us for document in added],
            "sizes": [document.text_bytes for document in added],
        },
    )


class Documents(CatalogPart):
    """Appending to a memory, deleting from it, and reading what it holds."""

    @writes
    async def commit_append(
        self,
        memory_uid: str,
        expected_revision: int,
        documents: Sequence[DocumentRow],
        request: RequestRecord | None,
    ) -> MemoryRow:
        """Makes new documents visible as revision expected_revision + 1.

        Their numbers ascend and lie above the memory's last_number; gaps are
        allowed. Raises ConflictError (revision or numbers moved on), NotFoundError,
        RequestRepeatedError, RequestIdReusedError, ValueError.
        """
        revision = expected_revision + 1
        _check_new(documents, revision)
        text_bytes = sum(document.text_bytes for document in documents)
        values = {
            "revision": revision,
            "last_number": documents[-1].number,
            "document_count": memories.c.document_count + len(documents),
            "text_bytes": memories.c.text_bytes + text_bytes,
        }
        async with self._leading(memory_uid=memory_uid) as connection:
            above = memories.c.last_number < documents[0].number
            row = await self._advance(
                connection, memory_uid, expected_revision, values, request, above
            )
            await insert_documents(self._database, connection, memory_uid, documents)
            await grow_pending(connection, memory_uid, len(documents), text_bytes, documents[0])
            await record_revision(connection, row, added=len(documents))
        return row

    async def commit_delete_documents(
        self,
        memory_uid: str,
        expected_revision: int,
        numbers: Iterable[int],
        request: RequestRecord | None,
    ) -> MemoryRow:
        """Hides documents as revision expected_revision + 1 and moves deletion_epoch on.

        All or none: raises NotFoundError with the `numbers` that are no live
        documents; also ConflictError, RequestRepeatedError, RequestIdReusedError,
        ValueError (no numbers).
        """
        chosen = sorted(set(numbers))
        if not chosen:
            raise ValueError("a deletion needs at least one document")
        return await self._commit_removal(memory_uid, expected_revision, chosen, request)

    async def commit_restore(
        self,
        memory_uid: str,
        expected_revision: int,
        numbers: Iterable[int],
        request: RequestRecord | None,
    ) -> MemoryRow:
        """As commit_delete_documents, of what came after a revision; there may be nothing."""
        chosen = sorted(set(numbers))
        return await self._commit_removal(memory_uid, expected_revision, chosen, request)

    @writes
    async def _commit_removal(
        self,
        memory_uid: str,
        expected_revision: int,
        chosen: Sequence[int],
        request: RequestRecord | None,
    ) -> MemoryRow:
        async with self._leading(memory_uid=memory_uid) as connection:
            values: dict[str, Any] = {
                "revision": expected_revision + 1,
                "deletion_epoch": memories.c.deletion_epoch + 1,
            }
            await self._advance(connection, memory_uid, expected_revision, values, request)
            removed = await self._mark_removed(
                connection, memory_uid, chosen, expected_revision + 1
            )
            text_bytes = sum(document.text_bytes for document in removed)
            counted = await connection.execute(
                update(memories)
                .where(memories.c.uid == memory_uid)
                .values(
                    document_count=memories.c.document_count - len(removed),
                    text_bytes=memories.c.text_bytes - text_bytes,
                )
                .returning(memories)
            )
            row = memory_row(counted.one())
            await shrink_encodings(connection, row, removed)
            await record_revision(connection, row, removed=len(removed))
        return row

    async def _advance(
        self,
        connection: Statements,
        memory_uid: str,
        expected_revision: int,
        values: dict[str, Any],
        request: RequestRecord | None,
        *guards: Any,
    ) -> MemoryRow:
        """Moves the memory's row on and records the request; locks the row."""
        changed = await connection.execute(
            update(memories)
            .where(
                memories.c.uid == memory_uid,
                memories.c.revision == expected_revision,
                NOT_DELETING,
                *guards,
            )
            .values({**values, **CHANGED, "updated_us": self._clock_us()})
            .returning(memories)
        )
        row = changed.one_or_none()
        if row is None:
            await self._explain(connection, memory_uid, expected_revision, request)
        assert row is not None
        await self._record_request(connection, row.tenant_uid, request)
        return memory_row(row)

    async def _explain(
        self,
        connection: Statements,
        memory_uid: str,
        expected_revision: int,
        request: RequestRecord | None,
    ) -> None:
        """Raises what kept a write from matching its memory."""
        found = select(memories).where(memories.c.uid == memory_uid, NOT_DELETING)
        row = (await connection.execute(found)).one_or_none()
        if row is None:
            raise NotFoundError(f"no memory {memory_uid}")
        await self._refuse_repeated(connection, row.tenant_uid, request)
        raise ConflictError(
            f"memory {memory_uid} is at revision {row.revision}, document {row.last_number}; "
            f"the write expected revision {expected_revision}"
        )

    async def _mark_removed(
        self, connection: Statements, memory_uid: str, numbers: Sequence[int], revision: int
    ) -> list[Removed]:
        removed: list[Removed] = []
        for some in slices(numbers):
            done = await mark_removed(connection, memory_uid, some, revision)
            removed.extend(Removed(row.number, row.text_bytes) for row in done)
        if len(removed) != len(numbers):
            missing = sorted(set(numbers) - {document.number for document in removed})
            raise NotFoundError(f"no documents {missing}", tuple(missing))
        return removed

    @reads
    async def find_request(self, tenant_uid: str, request_id: str) -> RequestRecord | None:
        """What was answered to this tenant's request id, or None."""
        async with self._database.reading() as connection:
            return await self._find_request(connection, tenant_uid, request_id)

    @writes
    async def purge_requests(self, older_than_us: int) -> int:
        """Forgets request records made before that time; returns how many."""
        old = requests.c.created_us < older_than_us
        async with self._database.writing() as connection:
            return (await connection.execute(delete(requests).where(old))).rowcount

    @reads
    async def get_document(self, memory_uid: str, number: int) -> DocumentRow:
        """The live document of that number. Raises NotFoundError."""
        async with self._database.reading() as connection:
            rows = await shown(connection, memory_uid, _COLUMNS, number, number)
        if not rows:
            raise NotFoundError(f"no document {number}", (number,))
        return _document(rows[0])

    @reads
    async def get_documents(
        self, memory_uid: str, numbers: Iterable[int]
    ) -> dict[int, DocumentRow]:
        """Those of these documents that are live, by number."""
        found: dict[int, DocumentRow] = {}
        async with self._database.reading() as connection:
            for some in slices(sorted(set(numbers))):
                chosen = _table.c.number.in_(some)
                rows = await shown(connection, memory_uid, _COLUMNS, some[0], some[-1], chosen)
                found.update((row.number, _document(row)) for row in rows)
        return found

    @reads
    async def list_documents(
        self,
        memory_uid: str,
        limit: int,
        after_number: int | None = None,
        last_number: int | None = None,
    ) -> tuple[list[DocumentRow], int | None]:
        """One page of live documents by ascending number, and after_number of the next.

        last_number: none above it; None for all.
        """
        limit = page_size(limit)
        first = (after_number or 0) + 1
        last = MAX_NUMBER if last_number is None else last_number
        async with self._database.reading() as connection:
            found = await shown(connection, memory_uid, _COLUMNS, first, last, limit=limit + 1)
        rows = [_document(row) for row in found]
        return rows[:limit], rows[limit - 1].number if len(rows) > limit else None

    @reads
    async def live_numbers(self, memory_uid: str, first: int, last: int) -> list[int]:
        """Numbers of the live documents from `first` to `last`, both included, ascending."""
        async with self._database.reading() as connection:
            rows = await shown(connection, memory_uid, (_table.c.number,), first, last)
        return [row.number for row in rows]

    @reads
    async def numbers_added_before(self, memory_uid: str, moment_us: int, limit: int) -> list[int]:
        """The first live documents that were added before a moment, ascending."""
        old, number = _table.c.created_us < moment_us, (_table.c.number,)
        async with self._database.reading() as connection:
            rows = await shown(connection, memory_uid, number, 1, MAX_NUMBER, old, limit=limit)
        return [row.number for row in rows]

    @reads
    async def removed_numbers(self, memory_uid: str) -> list[int]:
        """Numbers of deleted documents whose text may still lie in the store, ascending."""
        query = select(_table.c.number).where(_table.c.memory_uid == memory_uid, REMOVED)
        query = query.order_by(_table.c.number)
        async with self._database.reading() as connection:
            return list((await connection.execute(query)).scalars())

    @writes
    async def forget_removed(self, memory_uid: str, numbers: Iterable[int]) -> None:
        """Drops the rows of deleted documents, once the store holds nothing of them that is the
        memory's; those that another memory shows go with the last one.

        Live documents and unknown numbers among them are left alone.
        """
        async with self._leading(memory_uid=memory_uid) as connection:
            for some in slices(sorted(set(numbers))):
                await settle(connection, memory_uid, some)
