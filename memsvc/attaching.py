"""Attaching models to a memory and detaching them, under the memory's write lock.

Attaching is a row in the catalog, which the encoding queue finds. Detaching goes
catalog, queue, store, workers: nothing makes new blocks once the row is gone and the
batches on their way have ended, so what is purged then stays away. A crash in between
leaves blocks that reconcile removes at the next start.
"""

from __future__ import annotations

from memsvc.application import Application
from memsvc.writes import memory_uid
from storage.catalog import MemoryRow
from storage.store import EncodingId


async def attach_model(
    application: Application, memory: MemoryRow, model_id: str, *, make_default: bool
) -> MemoryRow:
    """Raises NotFoundError (memory), ModelNotFoundError."""

    async def work(now: MemoryRow) -> MemoryRow:
        return await application.catalog.attach_model(now.uid, model_id, make_default=make_default)

    return await application.writes.change(memory, work)


async def detach_model(application: Application, memory: MemoryRow, model_id: str) -> MemoryRow:
    """When it returns, no worker and no file holds a block of the encoding.

    Raises ConflictError for the model that answers, NotFoundError (memory).
    """

    async def work() -> MemoryRow:
        encoding = await application.catalog.get_encoding(memory.uid, model_id)
        row = await application.catalog.detach_model(memory.uid, model_id)
        if encoding is not None:
            await application.encoding.release(memory.uid, model_id)
            blocks = EncodingId(bytes.fromhex(encoding.identity)[:16])
            await application.stores.run(
                memory.tenant_uid,
                lambda store: store.delete_encoding(memory_uid(memory), blocks),
            )
            await application.workers.evict(memory.tenant_uid, memory.uid)
        return row

    row = await application.writes.locks.run_whole(memory.tenant_uid, memory.memory_id, work)
    application.progress.publish(row.uid)
    return row
