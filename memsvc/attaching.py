"""Attaching models to a memory and detaching them, under the memory's write lock.

Attaching is a row in the catalog, which the encoding queue finds. Detaching goes
catalog, queue, store, workers: nothing makes new blocks once the row is gone and the
batches on their way have ended, so what is purged then stays away. A failure in between
leaves blocks that the same call removes, or reconcile at the next start. Blocks belong to an
identity, which several model ids may have: they go with the last row that has it.
"""

from __future__ import annotations

from memsvc.application import Application
from memsvc.deletion import DeletionUnfinishedError
from memsvc.encoding.texts import drop_encodings
from memsvc.writes import memory_uid
from storage.catalog import MemoryRow
from storage.store import EncodingId, StorageError


async def attach_model(
    application: Application, memory: MemoryRow, model_id: str, *, make_default: bool
) -> MemoryRow:
    """Raises NotFoundError (memory), ModelNotFoundError."""

    async def work(now: MemoryRow) -> MemoryRow:
        return await application.catalog.attach_model(now.uid, model_id, make_default=make_default)

    return await application.writes.change(memory, work)


async def detach_model(application: Application, memory: MemoryRow, model_id: str) -> MemoryRow:
    """When it returns, no worker and no file holds a block of the encoding, unless another
    model id that is attached has the same identity.

    Raises ConflictError for the model that answers, NotFoundError (memory); and
    DeletionUnfinishedError when blocks are left, which the same call removes then.
    """

    async def work() -> MemoryRow:
        row = await application.catalog.detach_model(memory.uid, model_id)
        await application.encoding.release(memory.uid, model_id)
        try:
            await _purge_detached(application, memory)
        except StorageError as error:
            raise DeletionUnfinishedError(f"memory {memory.uid}: {error}") from error
        finally:
            await application.workers.evict(memory.tenant_uid, memory.uid)
        return row

    row = await application.writes.locks.run_whole(memory.tenant_uid, memory.memory_id, work)
    application.progress.publish(row.uid)
    return row


async def _purge_detached(application: Application, memory: MemoryRow) -> None:
    """Removes the blocks of every encoding that no row of the memory stands for."""
    rows = await application.catalog.list_encodings(memory.uid)
    keep = frozenset(EncodingId(bytes.fromhex(row.identity)[:16]) for row in rows)
    await application.stores.run(memory.tenant_uid, drop_encodings, memory_uid(memory), keep)
