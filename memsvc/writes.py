"""The write path: what makes success durable and a retry safe.

    1. LMDB   texts under numbers the catalog has not given out yet; fsync
    2. SQL    one transaction: documents, the memory's revision, the reply of
              this request_id; what makes the write visible
    3. wake   whoever watches, and the encoding queue

A request_id is looked up by the SQL transaction itself, not before: a first try,
which nearly every call is, then costs no query for it.

A caller that leaves before 2 begins has written nothing, one that leaves later
all of it.

A crash or a failure between 1 and 2 leaves texts above the catalog's last
number. Nobody was told of them, nothing reads them: the next append overwrites
their numbers, and `memsvc.reconcile` removes the rest. Numbers are taken from
the row as read under the memory's lock, so an acknowledged document is never
overwritten.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.deletion import Deletions
from memsvc.limits import Limiter, memories_exceeded
from memsvc.locks import MemoryKey, MemoryLocks
from memsvc.stores import Stores
from storage.catalog import (
    Catalog,
    DocumentRow,
    LimitReachedError,
    MemoryRow,
    MemoryState,
    NotFoundError,
    RequestIdReusedError,
    RequestRecord,
    RequestRepeatedError,
)
from storage.documents import Source, text_bytes
from storage.failpoints import Failpoint, reach
from storage.store import MemoryUid, StoredDocument

log = logging.getLogger(__name__)

_ROWS_KEPT = 4096


@dataclass(frozen=True)
class Request:
    """What makes a retry of one write safe.

    method: the call's name. fingerprint: SHA-256 of the payload without its
    request_id. field: where the memory is named, for errors. memories: uids of those
    that the caller reaches; None for all of the tenant's. memory_id: of the memory that is
    written to; empty for a call that makes one.
    """

    tenant_uid: str
    method: str
    request_id: str
    fingerprint: bytes
    field: str
    memories: frozenset[str] | None = None
    memory_id: str = ""

    def record(self, reply: bytes, memory: MemoryRow | None = None) -> RequestRecord | None:
        """memory: that was written to. None without a request_id: then nothing is remembered."""
        if not self.request_id:
            return None
        uid = memory.uid if memory is not None else ""
        return RequestRecord(self.request_id, self.method, self.fingerprint, reply, uid)


@dataclass(frozen=True)
class Written:
    """What an append made: its revision and the numbers of its documents, ascending."""

    revision: int
    numbers: Sequence[int]


def memory_uid(row: MemoryRow) -> MemoryUid:
    """The uid as the store takes it."""
    return MemoryUid(bytes.fromhex(row.uid))


class Writes:
    """All changes of what is in a memory.

    notify: told of a memory after each visible change, and whether that was an append.
    deletions: destroy what was deleted.
    limiter: what a tenant may use, and when it is its turn.
    """

    def __init__(
        self,
        catalog: Catalog,
        stores: Stores,
        notify: Callable[[MemoryRow, bool], None],
        deletions: Deletions,
        limiter: Limiter,
    ) -> None:
        self._limiter = limiter
        self._catalog = catalog
        self._stores = stores
        self._notify = notify
        self._deletions = deletions
        self.locks = MemoryLocks()
        # Rows as this process, the only writer, last committed them. One is used and
        # changed under its memory's lock alone, and dropped when a write fails.
        self._latest: OrderedDict[MemoryKey, MemoryRow] = OrderedDict()

    async def first_reply(self, request: Request) -> bytes | None:
        """The reply this request_id got before. Raises REQUEST_ID_REUSED."""
        if not request.request_id:
            return None
        found = await self._catalog.find_request(request.tenant_uid, request.request_id)
        if found is None:
            return None
        now = request.record(b"", await self._written(request) if found.memory_uid else None)
        if now is None or not found.answers(now):
            raise errors.request_id_reused()
        return found.reply

    async def _written(self, request: Request) -> MemoryRow | None:
        """The memory that a request would write to; None when there is none of its name."""
        with suppress(NotFoundError):
            return await self._catalog.get_memory(request.tenant_uid, request.memory_id)
        return None

    async def once(self, request: Request, attempt: Callable[[], Awaitable[bytes]]) -> bytes:
        """Runs a write. What refuses it now must not hide that it was done before."""
        try:
            return await attempt()
        except RequestRepeatedError as repeated:
            return repeated.record.reply
        except RequestIdReusedError as error:
            raise errors.request_id_reused() from error
        except LimitReachedError as error:
            raise memories_exceeded(error) from error
        except ApiError:
            before = await self.first_reply(request)
            if before is None:
                raise
            return before

    async def append(
        self,
        request: Request,
        memory_id: str,
        sources: Callable[[MemoryRow], Sequence[Source]],
        reply: Callable[[Written], bytes],
        admit: Callable[[], None],
    ) -> bytes:
        """Adds documents. Returns the reply, which is that of the first try for a retry.

        sources: what to store, given the memory (its packing policy).
        admit: raises when the server takes no more now.
        Raises MEMORY_NOT_FOUND, MEMORY_NOT_ACTIVE, QUOTA_EXCEEDED, STORAGE_FULL,
        REQUEST_ID_REUSED; then nothing is visible.
        """

        async def attempt() -> bytes:
            admit()
            return await self._run(
                request, memory_id, lambda: self._append(request, memory_id, sources, reply)
            )

        return await self.once(request, attempt)

    async def delete_documents(
        self,
        request: Request,
        memory_id: str,
        numbers: Sequence[int],
        reply: Callable[[int], bytes],
    ) -> bytes:
        """Removes documents, all or none; invisible as soon as SQL has committed.

        reply: made from the new revision. Raises DOCUMENT_NOT_FOUND naming the
        first missing one, MEMORY_NOT_FOUND, MEMORY_NOT_ACTIVE, REQUEST_ID_REUSED;
        DeletionUnfinishedError, when they are removed and not destroyed yet: a retry goes on.
        """

        async def work(memory: MemoryRow) -> bytes:
            return await self.delete_from(memory, request, numbers, reply)

        return await self.run(request, memory_id, work)

    async def delete_from(
        self,
        memory: MemoryRow,
        request: Request,
        numbers: Sequence[int],
        reply: Callable[[int], bytes],
    ) -> bytes:
        """As delete_documents, inside of `run`."""
        answer = reply(memory.revision + 1)

        async def commit() -> MemoryRow:
            row = await self._catalog.commit_delete_documents(
                memory.uid, memory.revision, numbers, request.record(answer, memory)
            )
            self.committed(row)
            reach(Failpoint.DELETE_COMMITTED)
            return row

        try:
            await self._deletions.remove_documents(memory, numbers, commit)
        except NotFoundError as error:
            if not error.numbers:
                raise
            missing = numbers.index(error.numbers[0])
            raise errors.document_not_found(f"names[{missing}]") from error
        return answer

    async def run(
        self, request: Request, memory_id: str, work: Callable[[MemoryRow], Awaitable[bytes]]
    ) -> bytes:
        """A write of another kind: `work` gets the memory's row, under its lock, and returns
        the reply. Raises MEMORY_NOT_FOUND, MEMORY_NOT_ACTIVE, REQUEST_ID_REUSED.
        """

        async def locked() -> bytes:
            return await work(await self._active(request, memory_id))

        return await self.once(request, lambda: self._run(request, memory_id, locked))

    async def change(
        self, row: MemoryRow, work: Callable[[MemoryRow], Awaitable[MemoryRow]]
    ) -> MemoryRow:
        """A change of the memory itself, not of what is in it, and of no other that took its
        name meanwhile: `work` gets its row as it is now, under its lock, and returns the
        committed one. Raises NotFoundError, and what work does.
        """

        async def locked() -> MemoryRow:
            self._latest.pop((row.tenant_uid, row.memory_id), None)
            memory = await self._catalog.settled_memory(row.tenant_uid, row.memory_id)
            if memory.uid != row.uid:
                raise NotFoundError("another memory has its name now")
            changed = await work(memory)
            self.committed(changed)
            return changed

        return await self.locks.run_whole(row.tenant_uid, row.memory_id, locked)

    async def delete_memory(
        self, row: MemoryRow, expected_version: int | None, *, state: MemoryState | None = None
    ) -> None:
        """Deletes a memory with all that is in it, and no other that took its name meanwhile.

        state: the only one in which it is deleted. Raises NotFoundError, ConflictError;
        DeletionUnfinishedError, when it is deleted and something of it is left.
        """

        async def work() -> None:
            self._latest.pop((row.tenant_uid, row.memory_id), None)
            memory = await self._catalog.begin_delete_memory(
                row.tenant_uid, row.memory_id, expected_version, uid=row.uid, state=state
            )
            self._notify(memory, False)
            reach(Failpoint.DROP_MARKED)
            await self._deletions.purge_memory(memory)

        await self.locks.run_whole(row.tenant_uid, row.memory_id, work)

    async def finish_deletion(self, row: MemoryRow) -> None:
        """Returns when nothing is left of a memory whose deletion is committed; a purge under way
        is waited for. Raises DeletionUnfinishedError, CatalogError.
        """

        async def work() -> None:
            with suppress(NotFoundError):
                memory = await self._catalog.get_memory_by_uid(row.uid)
                await self._deletions.purge_memory(memory)

        await self.locks.run_whole(row.tenant_uid, row.memory_id, work)

    async def finish_removal(self, memory: MemoryRow) -> None:
        """Destroys what is owed of a memory's deleted documents. Raises DeletionUnfinishedError,
        CatalogError.
        """
        await self.locks.run_whole(
            memory.tenant_uid, memory.memory_id, lambda: self._deletions.finish(memory)
        )

    async def drain(self) -> None:
        """Returns when every write that began has ended."""
        await self.locks.drain()

    async def _run(
        self, request: Request, memory_id: str, work: Callable[[], Awaitable[bytes]]
    ) -> bytes:
        """work under the memory's lock, from its start to its end."""

        async def guarded() -> bytes:
            try:
                return await work()
            except BaseException:
                self._latest.pop((request.tenant_uid, memory_id), None)
                raise

        try:
            return await self.locks.run_whole(request.tenant_uid, memory_id, guarded)
        except NotFoundError as error:
            raise errors.memory_not_found(request.field) from error

    def committed(self, memory: MemoryRow, *, appended: bool = False) -> None:
        """Takes note of a row as it was committed under its lock, and tells of it.

        appended: by an append.
        """
        key = (memory.tenant_uid, memory.memory_id)
        self._latest[key] = memory
        self._latest.move_to_end(key)
        if len(self._latest) > _ROWS_KEPT:
            self._latest.popitem(last=False)
        self._notify(memory, appended)

    async def _append(
        self,
        request: Request,
        memory_id: str,
        sources: Callable[[MemoryRow], Sequence[Source]],
        reply: Callable[[Written], bytes],
    ) -> bytes:
        memory = await self._active(request, memory_id)
        reach(Failpoint.APPEND_LOCKED)
        now_us = time.time_ns() // 1000
        revision = memory.revision + 1
        stored = [
            StoredDocument(memory.last_number + 1 + index, revision, now_us, source)
            for index, source in enumerate(sources(memory))
        ]
        rows = [DocumentRow(d.number, revision, now_us, text_bytes(d.source)) for d in stored]
        await self._check_quota(memory, rows)
        await self._limiter.turns.step(memory.tenant_uid)
        await self._stores.run(
            memory.tenant_uid, lambda store: store.put_documents(memory_uid(memory), stored)
        )
        reach(Failpoint.APPEND_STORED)
        await self._limiter.turns.step(memory.tenant_uid)
        numbers = [row.number for row in rows]
        if self.locks.caller_left():
            await self._deletions.purge_texts(memory, numbers)
            raise asyncio.CancelledError
        answer = reply(Written(revision, numbers))
        try:
            memory = await self._catalog.commit_append(
                memory.uid, memory.revision, rows, request.record(answer, memory)
            )
        except (RequestRepeatedError, RequestIdReusedError):
            # The first try may have stored the same texts under the same numbers.
            now = await self._catalog.get_memory_by_uid(memory.uid)
            unseen = [number for number in numbers if number > now.last_number]
            await self._deletions.purge_texts(memory, unseen)
            raise
        self.committed(memory, appended=True)
        reach(Failpoint.APPEND_COMMITTED)
        return answer

    async def _active(self, request: Request, memory_id: str) -> MemoryRow:
        memory = self._latest.get((request.tenant_uid, memory_id))
        if memory is None:
            memory = await self._catalog.settled_memory(request.tenant_uid, memory_id)
        if request.memories is not None and memory.uid not in request.memories:
            raise errors.memory_not_found(request.field)
        if memory.state is not MemoryState.ACTIVE:
            raise errors.memory_not_active(memory.state.name, request.field)
        return memory

    async def _check_quota(self, memory: MemoryRow, rows: Sequence[DocumentRow]) -> None:
        (await self._limiter.quotas(memory.tenant_uid)).check_memory(
            memory.document_count + len(rows),
            memory.text_bytes + sum(row.text_bytes for row in rows),
        )
