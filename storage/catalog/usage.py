"""What tenants hold and have used."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, reads, writes
from storage.catalog.connections import Database, Statements
from storage.catalog.memories import NOT_DELETING
from storage.catalog.rows import UsageRow
from storage.catalog.tables import encodings, memories, usage

_COUNTERS = ("queries", "question_tokens", "answer_tokens", "encoded_tokens")


async def count_usage(
    database: Database, connection: Statements, tenant_uid: str, added: Mapping[str, int]
) -> None:
    """Adds to a tenant's counters, inside the caller's transaction."""
    values = {**dict.fromkeys(_COUNTERS, 0), **added}
    insert = database.insert(usage).values(tenant_uid=tenant_uid, **values)
    sums = {name: usage.c[name] + insert.excluded[name] for name in values}
    await connection.execute(insert.on_conflict_do_update(index_elements=["tenant_uid"], set_=sums))


class Usage(CatalogPart):
    """Usage counters."""

    @writes
    async def add_usage(
        self,
        tenant_uid: str,
        queries: int = 0,
        question_tokens: int = 0,
        answer_tokens: int = 0,
        encoded_tokens: int = 0,
    ) -> None:
        """Adds to a tenant's counters, which go with the tenant: gone is no error."""
        added = {
            "queries": queries,
            "question_tokens": question_tokens,
            "answer_tokens": answer_tokens,
            "encoded_tokens": encoded_tokens,
        }
        # No other reference can be broken: the tenant was deleted.
        with suppress(IntegrityError):
            async with self._database.writing() as connection:
                await count_usage(self._database, connection, tenant_uid, added)

    @reads
    async def usage(self, tenant_uid: str) -> UsageRow:
        """What a tenant holds and has used; zeros where it has neither."""
        mine = (memories.c.tenant_uid == tenant_uid, NOT_DELETING)
        held = select(
            func.count(),
            func.coalesce(func.sum(memories.c.document_count), 0),
            func.coalesce(func.sum(memories.c.text_bytes), 0),
        ).where(*mine)
        blocks = select(func.coalesce(func.sum(encodings.c.bytes), 0))
        blocks = blocks.join_from(encodings, memories).where(*mine)
        used = select(
            usage.c.queries, usage.c.question_tokens, usage.c.answer_tokens, usage.c.encoded_tokens
        ).where(usage.c.tenant_uid == tenant_uid)
        async with self._database.reading() as connection:
            count, document_count, text_bytes = tuple((await connection.execute(held)).one())
            block_bytes = (await connection.execute(blocks)).scalar_one()
            counters = (await connection.execute(used)).one_or_none()
        return UsageRow(
            int(count),
            int(document_count),
            int(text_bytes),
            int(block_bytes),
            *(tuple(counters) if counters is not None else (0, 0, 0, 0)),
        )
