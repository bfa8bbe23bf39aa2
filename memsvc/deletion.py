"""What a deletion does once it is committed: keys, records, workers, receipt, rows.

The order is that of what matters. SQL has made it invisible already. Then the keys are
destroyed, with which nothing that is left anywhere can be read; the records go; the workers
overwrite what they hold; a receipt is signed; the rows go last, so that a crash on the way
leaves what reconcile finishes. What fails on the way is owed (`memsvc.owed`): the call says so,
and its repetition, or housekeeping, goes on with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from memsvc.keys import Keys
from memsvc.owed import Owed
from memsvc.receipts import Destroyed, Receipts
from memsvc.stores import Stores
from memsvc.workers import Evicted
from storage.catalog import (
    Catalog,
    CatalogError,
    CatalogFullError,
    ConflictError,
    LeaseLostError,
    MemoryRow,
    MemoryState,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
)
from storage.failpoints import Failpoint, reach
from storage.store import KeyMissingError, LetGo, MemoryUid, StorageError

log = logging.getLogger(__name__)

_KEY_PERSON = b"memsvc receipt"


#: Receipts of the call being served, for its reply.
issued: ContextVar[list[bytes]] = ContextVar("issued")

#: The catalog says that nothing was deleted. After another failure something may be.
_REFUSED = (
    CatalogFullError,
    ConflictError,
    LeaseLostError,
    NotFoundError,
    RequestIdReusedError,
)


class DeletionUnfinishedError(StorageError):
    """What was to be deleted is invisible, and may still lie on the disk."""


class Deletions:
    """Second half of deletions, also of those that a crash cut short.

    evict: makes the workers drop a memory; with an empty uid a tenant.
    """

    def __init__(
        self,
        catalog: Catalog,
        stores: Stores,
        keys: Keys,
        receipts: Receipts,
        evict: Callable[[str, str], Awaitable[Evicted]],
    ) -> None:
        self._catalog = catalog
        self._stores = stores
        self._keys = keys
        self._receipts = receipts
        self._evict = evict
        self.owed = Owed(catalog)

    async def purge_memory(self, memory: MemoryRow) -> None:
        """Everything of a memory whose deletion is committed, or what an earlier try left of it;
        under its lock. Raises DeletionUnfinishedError, CatalogError.
        """
        try:
            key = await self._fingerprint(memory)
            # By itself: a store that cannot be opened must not keep it.
            await asyncio.to_thread(self._keys.destroy, memory.tenant_uid, _uid(memory))
            gone = await self._stores.run(
                memory.tenant_uid, lambda store: store.delete_memory(_uid(memory))
            )
        except StorageError as error:
            await self._evict(memory.tenant_uid, memory.uid)
            raise DeletionUnfinishedError(f"memory {memory.uid}: {error}") from error
        reach(Failpoint.DROP_PURGED)
        evicted = await self._evict(memory.tenant_uid, memory.uid)
        reach(Failpoint.DROP_EVICTED)
        await self._certify(_destroyed(memory, None, gone, key, evicted))
        await self._catalog.finish_delete_memory(memory.uid)
        self.owed.settle(memory.uid)
        reach(Failpoint.DROP_FINISHED)

    async def remove_documents(
        self,
        memory: MemoryRow,
        numbers: Sequence[int],
        commit: Callable[[], Awaitable[MemoryRow]],
    ) -> None:
        """Has `commit` make documents invisible, then destroys them; under the memory's lock.

        Raises what commit does, after what is left of the first try was destroyed where it says
        that the request is repeated. DeletionUnfinishedError, CatalogError: some of it is left.
        """
        was_owed = memory.uid in self.owed
        self.owed.note(memory)
        try:
            memory = await commit()
        except RequestRepeatedError:
            await self.finish(memory)
            raise
        except _REFUSED:
            if not was_owed:
                self.owed.settle(memory.uid)
            raise
        self.owed.committed(memory.uid)
        if was_owed:
            await self.finish(memory)
        elif numbers:
            await self._destroy(memory, numbers)
        else:
            self.owed.settle(memory.uid)

    async def finish(self, memory: MemoryRow) -> None:
        """Destroys what is owed of a memory's deleted documents; under the memory's lock.

        Raises DeletionUnfinishedError, CatalogError.
        """
        if memory.uid not in self.owed:
            return
        numbers = await self._catalog.removed_numbers(memory.uid)
        if numbers:
            await self._destroy(memory, numbers)
        else:
            self.owed.settle(memory.uid)

    async def _destroy(self, memory: MemoryRow, numbers: Sequence[int]) -> None:
        """All that is owed of a memory."""
        try:
            key = await self._fingerprint(memory)
            gone = await self._stores.run(
                memory.tenant_uid, lambda store: store.delete_documents(_uid(memory), numbers)
            )
        except StorageError as error:
            # Who asks from now on says what is deleted; who asked before is to end.
            await self._evict(memory.tenant_uid, memory.uid)
            raise DeletionUnfinishedError(f"memory {memory.uid}: {error}") from error
        reach(Failpoint.DELETE_PURGED)
        evicted = await self._evict(memory.tenant_uid, memory.uid)
        reach(Failpoint.DELETE_EVICTED)
        await self._certify(_destroyed(memory, numbers, gone, key, evicted))
        try:
            await self._catalog.forget_removed(memory.uid, numbers)
        except CatalogError as error:
            # They are destroyed, which is what the caller asked for; their rows are still owed.
            _left_behind(memory, error)
        else:
            self.owed.settle(memory.uid)
        reach(Failpoint.DELETE_FORGOTTEN)

    async def purge_texts(self, memory: MemoryRow, numbers: Sequence[int]) -> None:
        """Removes documents that nobody was told of from the store, or leaves them to reconcile."""
        try:
            await self._stores.run(
                memory.tenant_uid, lambda store: store.delete_documents(_uid(memory), numbers)
            )
        except StorageError as error:
            _left_behind(memory, error)

    async def purge_tenant(self, tenant_uid: str) -> None:
        """A tenant whose memories are deleted: its keys, workers and files, with what could not be
        purged of single memories. Its rows are left.

        Raises DeletionUnfinishedError, CatalogError.
        """
        evicted = await self._evict(tenant_uid, "")
        try:
            await asyncio.to_thread(self._keys.destroy_tenant, tenant_uid)
            await self._stores.remove(tenant_uid)
        except StorageError as error:
            raise DeletionUnfinishedError(f"tenant {tenant_uid}: {error}") from error
        await self._certify(Destroyed(tenant_uid, wiped=evicted.wiped, owed=evicted.owed))
        for memory in await self._catalog.memories_in_state(MemoryState.DELETING, tenant_uid):
            await self._catalog.finish_delete_memory(memory.uid)
        self.owed.forget(tenant_uid)

    async def _fingerprint(self, memory: MemoryRow) -> str:
        """Of the key that is about to be destroyed: shows later that a found key was this one."""
        try:
            secret = await self._keys.secret(memory.tenant_uid, _uid(memory))
        except KeyMissingError:
            return ""
        if secret is None:
            return ""
        return hashlib.blake2b(secret.key, digest_size=16, person=_KEY_PERSON).hexdigest()

    async def _certify(self, destroyed: Destroyed) -> None:
        try:
            receipt = await asyncio.to_thread(self._receipts.issue, destroyed)
        except OSError as error:
            # What is destroyed is destroyed; a full disk must not keep it from being so.
            log.error("no receipt could be written", extra={"fault": type(error).__name__})
            return
        if (mine := issued.get(None)) is not None:
            mine.append(receipt)


def _uid(memory: MemoryRow) -> MemoryUid:
    return MemoryUid(bytes.fromhex(memory.uid))


def _destroyed(
    memory: MemoryRow,
    numbers: Sequence[int] | None,
    gone: LetGo,
    key: str,
    evicted: Evicted,
) -> Destroyed:
    return Destroyed(
        memory.tenant_uid,
        memory.uid,
        numbers,
        gone.texts,
        gone.blocks,
        gone.shared,
        key,
        evicted.wiped,
        evicted.owed,
    )


@contextmanager
def apart(memory: MemoryRow) -> Iterator[None]:
    """What fails for one memory is left for the next time, and keeps no other from its turn."""
    try:
        yield
    except Exception as error:
        log.error("left for the next time", extra={"memory_uid": memory.uid}, exc_info=error)


def _left_behind(memory: MemoryRow, error: Exception) -> None:
    log.warning(
        "left for reconcile", extra={"memory_uid": memory.uid, "fault": type(error).__name__}
    )
