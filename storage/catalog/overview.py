"""Memories with how far they are encoded: what users are shown of them, in one look.

A look is a hop to a thread and back where the catalog is a file, and costs more than
what is read: two of them would make the cheapest call there is twice as long.
"""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import select, tuple_

from storage.catalog.base import CatalogPart, page_size, reads
from storage.catalog.connections import Statements
from storage.catalog.memories import NOT_DELETING, first_memory, memory_row
from storage.catalog.progress import encodings_of
from storage.catalog.rows import Cursor, EncodingRow, MemoryRow
from storage.catalog.tables import memories


class Overview(CatalogPart):
    """Living memories and their encodings."""

    @reads
    async def show_memory(
        self, tenant_uid: str, memory_id: str, *, only: Iterable[str] | None = None
    ) -> tuple[MemoryRow, list[EncodingRow]]:
        """The memory of that name, and its encodings by model id. Raises NotFoundError.

        only: uids that count as there.
        """
        query = select(memories).where(
            memories.c.tenant_uid == tenant_uid, memories.c.memory_id == memory_id, NOT_DELETING
        )
        async with self._database.reading() as connection:
            memory = await first_memory(connection, query, memory_id, only)
            return memory, (await encodings_of(connection, [memory.uid]))[memory.uid]

    @reads
    async def list_memories(
        self,
        tenant_uid: str,
        limit: int,
        after: Cursor | None = None,
        only: Iterable[str] | None = None,
    ) -> tuple[list[MemoryRow], Cursor | None]:
        """One page of a tenant's living memories, newest first, and where the next starts.

        only: uids to which the listing is limited.
        """
        async with self._database.reading() as connection:
            return await _page(connection, tenant_uid, page_size(limit), after, only)

    @reads
    async def show_memories(
        self,
        tenant_uid: str,
        limit: int,
        after: Cursor | None = None,
        only: Iterable[str] | None = None,
    ) -> tuple[list[MemoryRow], dict[str, list[EncodingRow]], Cursor | None]:
        """As list_memories, with the encodings of each memory by its uid."""
        async with self._database.reading() as connection:
            rows, more = await _page(connection, tenant_uid, page_size(limit), after, only)
            return rows, await encodings_of(connection, [row.uid for row in rows]), more


async def _page(
    connection: Statements,
    tenant_uid: str,
    limit: int,
    after: Cursor | None,
    only: Iterable[str] | None,
) -> tuple[list[MemoryRow], Cursor | None]:
    """See Overview.list_memories."""
    key = (memories.c.created_us, memories.c.uid)
    query = select(memories).where(memories.c.tenant_uid == tenant_uid, NOT_DELETING)
    query = query.order_by(*(column.desc() for column in key)).limit(limit + 1)
    if after is not None:
        query = query.where(tuple_(*key) < tuple_(*after))
    if only is not None:
        query = query.where(memories.c.uid.in_(list(only)))
    rows = [memory_row(row) for row in await connection.execute(query)]
    more = len(rows) > limit
    return rows[:limit], (rows[limit - 1].created_us, rows[limit - 1].uid) if more else None
