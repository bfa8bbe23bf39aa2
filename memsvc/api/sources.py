"""Reading the sources of documents, and looking through them with a filter."""

from __future__ import annotations

from collections.abc import Sequence

from memsvc.application import Application
from memsvc.convert import document_to_wire
from memsvc.paging import PAGE_BYTES, fitting
from memsvc.v1 import resources_pb2
from memsvc.writes import memory_uid
from storage.catalog import MemoryRow
from storage.documents import Source
from storage.filters import DocumentFilter, matches
from storage.store import MemoryUid, RecordNotFoundError, TenantStore

#: Documents that a call looks at for one page, and at a time.
_LOOKED_AT, _BATCH = 2000, 200


async def read_sources(
    application: Application, memory: MemoryRow, numbers: Sequence[int]
) -> list[Source | None]:
    """Sources in the order asked; None for what the store does not hold (any more).

    Raises RECORD_CORRUPT (through the gate) for a damaged record.
    """
    if not numbers:
        return []
    return await application.stores.read(
        memory.tenant_uid, _read_sources, memory_uid(memory), list(numbers)
    )


def _read_sources(store: TenantStore, memory: MemoryUid, numbers: list[int]) -> list[Source | None]:
    def read(number: int) -> Source | None:
        try:
            return store.get_document(memory, number).source
        except RecordNotFoundError:
            return None

    return [read(number) for number in numbers]


async def matching(
    application: Application,
    memory: MemoryRow,
    wanted: DocumentFilter,
    *,
    after: int,
    limit: int,
    full: bool,
) -> tuple[list[resources_pb2.Document], int | None]:
    """The next documents behind number `after` that match, and where the next page begins.

    Their records are read: at most so many, and no more of those found than fit a page. None:
    there is no next page.
    """
    found: list[resources_pb2.Document] = []
    looked_at = size = 0
    more: int | None = after
    while more is not None and looked_at < _LOOKED_AT:
        rows, more = await application.catalog.list_documents(
            memory.uid, _BATCH, more, memory.last_number
        )
        rows_read = rows[: fitting(row.text_bytes for row in rows)]
        more = more if len(rows_read) == len(rows) else rows_read[-1].number
        sources = await read_sources(application, memory, [row.number for row in rows_read])
        for row, source in zip(rows_read, sources, strict=True):
            if source is None or not matches(wanted, source):
                continue
            document = document_to_wire(memory.memory_id, row, source if full else None)
            size += document.ByteSize()
            if found and size > PAGE_BYTES:
                return found, found[-1].number
            found.append(document)
            if len(found) == limit:
                return found, row.number if row is not rows[-1] or more is not None else None
        looked_at += len(rows_read)
    return found, more
