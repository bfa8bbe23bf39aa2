"""Deletes documents that a memory keeps no longer."""

from __future__ import annotations

import logging

from memsvc.api_error import ApiError
from memsvc.application import Application
from memsvc.deletion import apart
from memsvc.writes import Request
from storage.catalog import MemoryRow

log = logging.getLogger(__name__)

#: Documents of one deletion: each is one revision of its memory.
_BATCH = 1000


async def expire(application: Application, now_us: int) -> int:
    """Deletes every document that is older than its memory's retention; returns how many.

    now_us: UTC microseconds. Raises CatalogError.
    """
    count = 0
    for memory in await application.catalog.memories_with_retention():
        with apart(memory):
            count += await _expire(application, memory, now_us)
    return count


async def _expire(application: Application, memory: MemoryRow, now_us: int) -> int:
    request = Request(memory.tenant_uid, "Expire", "", b"", "memory", frozenset({memory.uid}))
    numbers: list[int] = []
    count = 0

    async def work(row: MemoryRow) -> bytes:
        nonlocal numbers
        numbers = await _expired(application, row, now_us)
        if not numbers:
            return b""
        return await application.writes.delete_from(row, request, numbers, lambda _: b"")

    while True:
        try:
            await application.writes.run(request, memory.memory_id, work)
        except ApiError as error:
            # Deleted meanwhile, by a caller or with its memory: seen again next time.
            log.info("expiry put off", extra={"memory_uid": memory.uid, "fault": error.message})
            return count
        if not numbers:
            return count
        count += len(numbers)


async def _expired(application: Application, memory: MemoryRow, now_us: int) -> list[int]:
    """The first documents past their time, by the retention as it is now, under the memory's lock:
    one that was prolonged or ended since the pass began holds.
    """
    catalog = application.catalog
    retention_s = (await catalog.get_memory_by_uid(memory.uid)).retention_s
    if retention_s is None:
        return []
    return await catalog.numbers_added_before(memory.uid, now_us - retention_s * 1_000_000, _BATCH)
