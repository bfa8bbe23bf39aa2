"""Forking a memory, and taking one back to an earlier revision; both under its write lock.

A fork goes store, catalog, as every write does:

    1. LMDB   the new memory's lineage and keys: it shares texts and blocks (storage/lineage.py)
    2. SQL    one transaction: its row, its documents' rows, its encodings, the reply of
              this request_id; what makes it visible

A crash in between leaves a memory that the catalog does not have: `memsvc.reconcile`
removes it, and with it its share of the documents.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from memsvc import errors
from memsvc.application import Application
from memsvc.past import as_of, check_past
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import Request, memory_uid
from storage.catalog import (
    AlreadyExistsError,
    ConflictError,
    EncodingRow,
    LimitReachedError,
    MemoryRow,
    NotFoundError,
    RequestIdReusedError,
    RequestRecord,
    RequestRepeatedError,
)
from storage.failpoints import Failpoint, reach
from storage.store import StorageError

#: Makes the reply from the new memory, its encodings, and how many documents it lacks.
ForkReply = Callable[[MemoryRow, Sequence[EncodingRow], int], bytes]

#: The catalog says that there is no such row. After another failure it may be there.
_REFUSED = (
    AlreadyExistsError,
    ConflictError,
    LimitReachedError,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
)


async def fork_memory(
    application: Application,
    request: Request,
    parent_id: str,
    wanted: pb.ForkMemoryRequest,
    reply: ForkReply,
) -> bytes:
    """Makes the memory `wanted.memory_id`, which is set. Returns the recorded reply.

    Raises MEMORY_NOT_FOUND, MEMORY_NOT_ACTIVE, ALREADY_EXISTS, REVISION_NOT_REACHED,
    FIELD_INVALID, REQUEST_ID_REUSED, STORAGE_FULL; then nothing is visible.
    """

    async def work(parent: MemoryRow) -> bytes:
        then = await as_of(application, parent, wanted)
        plain = await application.fields.opened(parent)
        child = replace(
            plain,
            uid=secrets.token_hex(16),
            memory_id=wanted.memory_id,
            display_name=wanted.display_name or plain.display_name,
            revision=then.revision,
            last_number=then.last_number,
        )
        try:
            return await _make(application, request, parent, child, reply)
        except AlreadyExistsError as error:
            raise errors.already_exists("memory_id") from error

    return await application.writes.run(request, parent_id, work)


async def _make(
    application: Application,
    request: Request,
    parent: MemoryRow,
    child: MemoryRow,
    reply: ForkReply,
) -> bytes:
    answer = b""

    def record(
        row: MemoryRow, encodings: Sequence[EncodingRow], missing: int
    ) -> RequestRecord | None:
        nonlocal answer
        answer = reply(row, encodings, missing)
        return request.record(answer, parent)

    most = (await application.limiter.quotas(parent.tenant_uid)).max_memories_per_tenant
    # What a deletion has not purged yet may still lie in the store.
    removed = await application.catalog.removed_numbers(parent.uid)
    sealed = await application.fields.sealed(child)
    try:
        await application.stores.run(
            parent.tenant_uid,
            lambda store: store.fork(
                memory_uid(parent), memory_uid(child), child.last_number, removed
            ),
        )
    except StorageError:
        await application.fields.forget(child)
        raise
    reach(Failpoint.FORK_STORED)
    if application.writes.locks.caller_left():
        await _unmake(application, child)
        raise asyncio.CancelledError
    try:
        first = request.record(b"", parent)
        await application.catalog.commit_fork(parent, sealed, first, record, most=most)
    except _REFUSED:
        await _unmake(application, child)
        raise
    # Here, as its caller may leave before it is told.
    application.encoding.wake()
    reach(Failpoint.FORK_COMMITTED)
    return answer


async def _unmake(application: Application, child: MemoryRow) -> None:
    await application.stores.run(
        child.tenant_uid, lambda store: store.delete_memory(memory_uid(child))
    )


async def restore_memory(
    application: Application,
    request: Request,
    memory_id: str,
    revision: int,
    reply: Callable[[int, int, int], bytes],
) -> bytes:
    """Deletes what was added after a revision. Returns the recorded reply.

    reply: made from the new revision, how many documents were deleted, and how many of those
    of then had been deleted before. Raises MEMORY_NOT_FOUND, MEMORY_NOT_ACTIVE,
    REVISION_NOT_REACHED, FIELD_INVALID, REQUEST_ID_REUSED, DeletionUnfinishedError.
    """
    catalog = application.catalog

    async def work(memory: MemoryRow) -> bytes:
        check_past(memory, "revision", revision)
        then = await catalog.revision_at(memory.uid, revision=revision)
        numbers = await catalog.live_numbers(memory.uid, then.last_number + 1, memory.last_number)
        held = await catalog.documents_at(memory.uid, revision)
        missing = max(0, held - (memory.document_count - len(numbers)))
        answer = reply(memory.revision + 1, len(numbers), missing)

        async def commit() -> MemoryRow:
            row = await catalog.commit_restore(
                memory.uid, memory.revision, numbers, request.record(answer, memory)
            )
            application.writes.committed(row)
            reach(Failpoint.ROLLBACK_COMMITTED)
            return row

        await application.deletions.remove_documents(memory, numbers, commit)
        return answer

    return await application.writes.run(request, memory_id, work)
