"""Filling a memory from an archive: documents and revisions as they were elsewhere.

Other than an append, an import brings documents of many revisions, and the revisions
themselves. Nothing of it is visible before `activate_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import case, insert, select, update
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import MAX_BOUND, CatalogPart, writes
from storage.catalog.documents import insert_documents
from storage.catalog.errors import ConflictError, NotFoundError
from storage.catalog.memories import CHANGED, NOT_DELETING, memory_row
from storage.catalog.progress import grow_pending
from storage.catalog.rows import DocumentRow, MemoryRow, MemoryState, RequestRecord, RevisionRow
from storage.catalog.tables import memories
from storage.catalog.tables import revisions as _revisions

_IMPORTING = memories.c.state == MemoryState.IMPORTING.value
_ROW_VALUES = 6


class Imports(CatalogPart):
    """What only a memory that is being imported may be given."""

    @writes
    async def commit_import(self, memory_uid: str, documents: Sequence[DocumentRow]) -> MemoryRow:
        """Adds documents with the numbers and revisions that they had.

        Numbers ascend and lie above the memory's last_number, revisions do not descend. Raises
        ConflictError unless so, or unless the memory is being imported.
        """
        last = 0
        for document in documents:
            if document.number <= last:
                raise ValueError(f"document {document.number} follows {last}")
            last = document.number
        text_bytes = sum(document.text_bytes for document in documents)
        newest = documents[-1].revision_added
        async with self._leading(memory_uid=memory_uid) as connection:
            changed = await connection.execute(
                update(memories)
                .where(
                    memories.c.uid == memory_uid,
                    _IMPORTING,
                    memories.c.last_number < documents[0].number,
                    memories.c.revision <= documents[0].revision_added,
                )
                .values(
                    **CHANGED,
                    revision=newest,
                    last_number=last,
                    document_count=memories.c.document_count + len(documents),
                    text_bytes=memories.c.text_bytes + text_bytes,
                    updated_us=self._clock_us(),
                )
                .returning(memories)
            )
            row = changed.one_or_none()
            if row is None:
                raise ConflictError(f"memory {memory_uid} does not take these documents")
            await insert_documents(self._database, connection, memory_uid, documents)
            await grow_pending(connection, memory_uid, len(documents), text_bytes, documents[0])
        return memory_row(row)

    @writes
    async def commit_import_revisions(self, rows: Sequence[RevisionRow]) -> None:
        """Writes down what earlier writes made, elsewhere. Numbers must be new.

        Raises NotFoundError when the memory is gone.
        """
        async with self._leading(memory_uid=rows[0].memory_uid if rows else "") as connection:
            most = MAX_BOUND // _ROW_VALUES
            for start in range(0, len(rows), most):
                values = [dict(vars(row)) for row in rows[start : start + most]]
                try:
                    await connection.execute(insert(_revisions).values(values))
                except IntegrityError as error:
                    raise NotFoundError(f"no memory {rows[0].memory_uid}") from error

    @writes
    async def activate_memory(
        self,
        uid: str,
        *,
        request: RequestRecord | None = None,
        last_number: int = 0,
        revision: int = 0,
    ) -> MemoryRow:
        """Ends an import: IMPORTING becomes ACTIVE; an ACTIVE memory stays as it is.

        last_number, revision: the highest that there were where the memory came from;
        none up to them will be given out again.

        Raises NotFoundError (also for one being deleted), RequestRepeatedError,
        RequestIdReusedError.
        """
        values = {
            **CHANGED,
            "state": MemoryState.ACTIVE.value,
            "last_number": case(
                (memories.c.last_number < last_number, last_number), else_=memories.c.last_number
            ),
            "revision": case((memories.c.revision < revision, revision), else_=memories.c.revision),
            "updated_us": self._clock_us(),
        }
        async with self._leading(memory_uid=uid) as connection:
            found = select(memories).where(memories.c.uid == uid, NOT_DELETING).with_for_update()
            row = (await connection.execute(found)).one_or_none()
            if row is None:
                raise NotFoundError(f"no memory {uid}")
            await self._record_request(connection, row.tenant_uid, request)
            change = update(memories).where(memories.c.uid == uid, _IMPORTING).values(values)
            changed = (await connection.execute(change.returning(memories))).one_or_none()
        return memory_row(changed if changed is not None else row)
