"""Tenants."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, new_uid, page_size, reads, writes
from storage.catalog.errors import AlreadyExistsError, ConflictError, NotFoundError
from storage.catalog.rows import Cursor, TenantRow
from storage.catalog.tables import memories, tenants


def _tenant(row: Row[Any]) -> TenantRow:
    return TenantRow(**row._mapping)


class Tenants(CatalogPart):
    """Tenants; their keys are ApiKeys'."""

    @writes
    async def create_tenant(self, tenant_id: str, display_name: str) -> TenantRow:
        """Makes a tenant. Raises AlreadyExistsError if tenant_id is taken."""
        row = TenantRow(new_uid(), tenant_id, display_name, self._clock_us())
        async with self._database.writing() as connection:
            try:
                await connection.execute(insert(tenants).values(**vars(row)))
            except IntegrityError as error:
                raise AlreadyExistsError(f"tenant {tenant_id} exists") from error
        return row

    @reads
    async def get_tenant(self, tenant_id: str) -> TenantRow:
        """The tenant of that name. Raises NotFoundError."""
        async with self._database.reading() as connection:
            query = select(tenants).where(tenants.c.tenant_id == tenant_id)
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(f"no tenant {tenant_id}")
        return _tenant(row)

    @reads
    async def list_tenants(
        self, limit: int, after: Cursor | None = None
    ) -> tuple[list[TenantRow], Cursor | None]:
        """One page of tenants, newest first, and where the next one starts."""
        limit = page_size(limit)
        key = (tenants.c.created_us, tenants.c.uid)
        query = select(tenants).order_by(*(column.desc() for column in key)).limit(limit + 1)
        if after is not None:
            query = query.where(tuple_(*key) < tuple_(*after))
        async with self._database.reading() as connection:
            rows = [_tenant(row) for row in await connection.execute(query)]
        more = len(rows) > limit
        return rows[:limit], (rows[limit - 1].created_us, rows[limit - 1].uid) if more else None

    @writes
    async def begin_delete_tenant(self, uid: str) -> None:
        """Marks a tenant: its keys open nothing any more, and it gets no further memory. Again,
        or gone, is no error.
        """
        mark = update(tenants).where(tenants.c.uid == uid, tenants.c.deleting_us.is_(None))
        async with self._leading(tenant_uid=uid) as connection:
            await connection.execute(mark.values(deleting_us=self._clock_us()))

    @reads
    async def tenants_being_deleted(self) -> list[TenantRow]:
        """Tenants whose deletion began and has not ended; for reconciling."""
        query = select(tenants).where(tenants.c.deleting_us.is_not(None))
        async with self._database.reading() as connection:
            rows = await connection.execute(query.order_by(tenants.c.created_us, tenants.c.uid))
            return [_tenant(row) for row in rows]

    @writes
    async def delete_tenant(self, uid: str) -> None:
        """Deletes the tenant with its keys, usage and request records; audit stays.

        Raises ConflictError while it has a memory, also one that is being deleted,
        and NotFoundError.
        """
        async with self._leading(tenant_uid=uid) as connection:
            held = select(func.count()).select_from(memories).where(memories.c.tenant_uid == uid)
            if (await connection.execute(held)).scalar_one():
                raise ConflictError(f"tenant {uid} still has memories")
            try:
                done = await connection.execute(delete(tenants).where(tenants.c.uid == uid))
            except IntegrityError as error:
                raise ConflictError(f"tenant {uid} still has memories") from error
            if done.rowcount != 1:
                raise NotFoundError(f"no tenant {uid}")
