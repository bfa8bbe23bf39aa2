"""The audit trail: who did what. It is added to and read; nothing changes or deletes it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from sqlalchemy import Row, Select, insert, select
from sqlalchemy.exc import IntegrityError

from storage.catalog.audit_chain import GENESIS, chain_digest
from storage.catalog.base import CatalogPart, page_size, reads, writes
from storage.catalog.errors import ConflictError
from storage.catalog.rows import AuditRow
from storage.catalog.tables import audit

#: Several processes may add to one tenant's trail; each takes the next number.
_TRIES = 20


def _entry(row: Row[Any]) -> AuditRow:
    return AuditRow(**row._mapping)


def _entries(tenant_uid: str) -> Select[Any]:
    columns = [audit.c[name] for name in AuditRow.__dataclass_fields__]
    # Entries from before there was a chain have no number.
    return select(*columns).where(audit.c.tenant_uid == tenant_uid, audit.c.sequence.is_not(None))


class Audit(CatalogPart):
    """The audit trail, a chain of entries per tenant. It outlives the tenant."""

    async def add_audit(
        self, key: bytes, tenant_uid: str, actor: str, action: str, *, resource: str, outcome: str
    ) -> AuditRow:
        """Adds an entry; user text has no place in it. key: of the chain's digests.

        Entries of this server wait for each other; it is tried again where another server was
        faster.
        """
        async with self._trails.setdefault(tenant_uid, asyncio.Lock()):
            for _ in range(_TRIES):
                now_us = self._clock_us()
                row = AuditRow(0, now_us, tenant_uid, actor, action, resource, outcome, b"")
                try:
                    return await self._append(key, row)
                except ConflictError:
                    continue
        raise ConflictError(f"the trail of tenant {tenant_uid} is being written by others")

    @writes
    async def _append(self, key: bytes, row: AuditRow) -> AuditRow:
        newest = _entries(row.tenant_uid).order_by(audit.c.sequence.desc()).limit(1)
        async with self._database.writing() as connection:
            last = (await connection.execute(newest)).one_or_none()
            sequence, previous = (last.sequence, last.digest) if last is not None else (0, GENESIS)
            row = replace(row, sequence=sequence + 1)
            row = replace(row, digest=chain_digest(key, previous, row))
            try:
                await connection.execute(insert(audit).values(vars(row)))
            except IntegrityError as error:
                raise ConflictError(f"entry {row.sequence} was written meanwhile") from error
        return row

    @reads
    async def list_audit(
        self, tenant_uid: str, limit: int, before: int | None = None
    ) -> tuple[list[AuditRow], int | None]:
        """One page of a tenant's entries, newest first, and the number the next one is before."""
        limit = page_size(limit)
        query = _entries(tenant_uid).order_by(audit.c.sequence.desc()).limit(limit + 1)
        if before is not None:
            query = query.where(audit.c.sequence < before)
        async with self._database.reading() as connection:
            rows = [_entry(row) for row in await connection.execute(query)]
        return rows[:limit], rows[limit - 1].sequence if len(rows) > limit else None

    @reads
    async def audit_chain(self, tenant_uid: str, after: int, limit: int) -> list[AuditRow]:
        """Entries above a number, ascending; deleted tenants' too."""
        query = _entries(tenant_uid).where(audit.c.sequence > after)
        query = query.order_by(audit.c.sequence).limit(page_size(limit))
        async with self._database.reading() as connection:
            return [_entry(row) for row in await connection.execute(query)]

    @reads
    async def audited_tenants(self) -> list[str]:
        """Uids of every tenant with a trail, ascending."""
        query = select(audit.c.tenant_uid).distinct().order_by(audit.c.tenant_uid)
        async with self._database.reading() as connection:
            return list((await connection.execute(query)).scalars())
