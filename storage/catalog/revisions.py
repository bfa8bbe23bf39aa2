"""What every write to a memory made: one row per revision, written in the write's transaction.

A memory as of a revision is its live documents up to that revision's last number: documents
are numbered in the order of their revisions, and never change. What was deleted since is not
among them: a deletion holds for the past too.
"""

from __future__ import annotations

from sqlalchemy import insert, select

from storage.catalog.base import CatalogPart, page_size, reads
from storage.catalog.connections import Statements
from storage.catalog.rows import MemoryRow, RevisionRow
from storage.catalog.tables import revisions

_NOTHING = {"documents_added": 0, "documents_removed": 0, "last_number": 0}


async def record_revision(
    connection: Statements, memory: MemoryRow, *, added: int = 0, removed: int = 0
) -> None:
    """Writes down the revision that the memory's row has now."""
    await connection.execute(
        insert(revisions).values(
            memory_uid=memory.uid,
            revision=memory.revision,
            created_us=memory.updated_us,
            documents_added=added,
            documents_removed=removed,
            last_number=memory.last_number,
        )
    )


class Revisions(CatalogPart):
    """The past of memories."""

    @reads
    async def revision_at(
        self, memory_uid: str, *, revision: int | None = None, at_us: int | None = None
    ) -> RevisionRow:
        """The newest revision up to that number or that time (UTC microseconds).

        Before the first one there is revision 0, without documents.
        """
        query = select(revisions).where(revisions.c.memory_uid == memory_uid)
        if revision is not None:
            query = query.where(revisions.c.revision <= revision)
        if at_us is not None:
            query = query.where(revisions.c.created_us <= at_us)
        async with self._database.reading() as connection:
            newest = query.order_by(revisions.c.revision.desc()).limit(1)
            row = (await connection.execute(newest)).first()
        if row is None:
            return RevisionRow(memory_uid=memory_uid, revision=0, created_us=0, **_NOTHING)
        return RevisionRow(**row._mapping)

    @reads
    async def revisions_after(
        self, memory_uid: str, after: int, up_to: int, limit: int
    ) -> list[RevisionRow]:
        """The first rows above `after`, none above `up_to`, ascending."""
        query = (
            select(revisions)
            .where(
                revisions.c.memory_uid == memory_uid,
                revisions.c.revision > after,
                revisions.c.revision <= up_to,
            )
            .order_by(revisions.c.revision)
            .limit(page_size(limit))
        )
        async with self._database.reading() as connection:
            return [RevisionRow(**row._mapping) for row in await connection.execute(query)]

    @reads
    async def list_revisions(
        self, memory_uid: str, limit: int, before: int | None = None
    ) -> tuple[list[RevisionRow], int | None]:
        """One page, newest first, and `before` of the next one."""
        limit = page_size(limit)
        query = select(revisions).where(revisions.c.memory_uid == memory_uid)
        if before is not None:
            query = query.where(revisions.c.revision < before)
        query = query.order_by(revisions.c.revision.desc()).limit(limit + 1)
        async with self._database.reading() as connection:
            rows = [RevisionRow(**row._mapping) for row in await connection.execute(query)]
        return rows[:limit], rows[limit - 1].revision if len(rows) > limit else None
