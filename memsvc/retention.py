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
    assert memory.retention_s is not None
    before_us = now_us - memory.retention_s * 1_000_000
    count = 0
    request = Request(memory.tenant_uid, "Expire", "", b"", "memory", frozenset({memory.uid}))
    while True:
        numbers = await application.catalog.numbers_added_before(memory.uid, before_us, _BATCH)
        if not numbers:
            return count
        try:
            await application.writes.delete_documents(
                request, memory.memory_id, numbers, lambda _: b""
            )
        except ApiError as error:
            # Deleted meanwhile, by a caller or with its memory: seen again next time.
            log.info("expiry put off", extra={"memory_uid": memory.uid, "fault": error.message})
            return count
        count += len(numbers)
