"""Tenants and their API keys."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, Select, delete, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, new_uid, page_size, reads, writes
from storage.catalog.errors import AlreadyExistsError, ConflictError, NotFoundError
from storage.catalog.rows import ApiKeyRow, Cursor, Scope, TenantRow
from storage.catalog.tables import api_keys, memories, tenants


def _tenant(row: Row[Any]) -> TenantRow:
    return TenantRow(**row._mapping)


def _key(row: Row[Any]) -> ApiKeyRow:
    return ApiKeyRow(**{**row._mapping, "scope": Scope(row.scope)})


def _keys() -> Select[Any]:
    return select(api_keys, tenants.c.tenant_id).join(tenants)


class Tenants(CatalogPart):
    """Tenants and API keys."""

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
    async def delete_tenant(self, uid: str) -> None:
        """Deletes the tenant with its keys, usage and request records; audit stays.

        Raises ConflictError while it has a memory, also one that is being deleted,
        and NotFoundError.
        """
        async with self._database.writing() as connection:
            held = select(func.count()).select_from(memories).where(memories.c.tenant_uid == uid)
            if (await connection.execute(held)).scalar_one():
                raise ConflictError(f"tenant {uid} still has memories")
            try:
                done = await connection.execute(delete(tenants).where(tenants.c.uid == uid))
            except IntegrityError as error:
                raise ConflictError(f"tenant {uid} still has memories") from error
            if done.rowcount != 1:
                raise NotFoundError(f"no tenant {uid}")

    @writes
    async def create_api_key(  # noqa: PLR0917 - a key's fields
        self,
        key_id: str,
        tenant_uid: str,
        display_name: str,
        scope: Scope,
        operator: bool,
        digest: bytes,
        expires_us: int | None,
    ) -> ApiKeyRow:
        """Stores a key's digest. Raises AlreadyExistsError, or NotFoundError (tenant)."""
        values = {
            "key_id": key_id,
            "tenant_uid": tenant_uid,
            "display_name": display_name,
            "scope": scope.value,
            "operator": operator,
            "digest": digest,
            "created_us": self._clock_us(),
            "expires_us": expires_us,
        }
        async with self._database.writing() as connection:
            known = select(tenants.c.uid).where(tenants.c.uid == tenant_uid)
            if (await connection.execute(known.with_for_update(read=True))).first() is None:
                raise NotFoundError(f"no tenant {tenant_uid}")
            try:
                await connection.execute(insert(api_keys).values(values))
            except IntegrityError as error:
                raise AlreadyExistsError(f"API key {key_id} exists") from error
            query = _keys().where(api_keys.c.key_id == key_id)
            return _key((await connection.execute(query)).one())

    @reads
    async def find_api_key(self, key_id: str) -> ApiKeyRow | None:
        """The key, revoked and expired ones included, or None."""
        async with self._database.reading() as connection:
            query = _keys().where(api_keys.c.key_id == key_id)
            row = (await connection.execute(query)).one_or_none()
        return _key(row) if row is not None else None

    @reads
    async def list_api_keys(
        self, tenant_uid: str, limit: int, after: Cursor | None = None
    ) -> tuple[list[ApiKeyRow], Cursor | None]:
        """One page of a tenant's keys, newest first, and where the next one starts."""
        limit = page_size(limit)
        key = (api_keys.c.created_us, api_keys.c.key_id)
        query = _keys().where(api_keys.c.tenant_uid == tenant_uid)
        query = query.order_by(*(column.desc() for column in key)).limit(limit + 1)
        if after is not None:
            query = query.where(tuple_(*key) < tuple_(*after))
        async with self._database.reading() as connection:
            rows = [_key(row) for row in await connection.execute(query)]
        more = len(rows) > limit
        return rows[:limit], (rows[limit - 1].created_us, rows[limit - 1].key_id) if more else None

    @writes
    async def revoke_api_key(self, tenant_uid: str, key_id: str) -> ApiKeyRow:
        """Revokes a key of this tenant; a second time changes nothing. Raises NotFoundError."""
        async with self._database.writing() as connection:
            await connection.execute(
                update(api_keys)
                .where(
                    api_keys.c.tenant_uid == tenant_uid,
                    api_keys.c.key_id == key_id,
                    api_keys.c.revoked_us.is_(None),
                )
                .values(revoked_us=self._clock_us())
            )
            query = _keys().where(api_keys.c.tenant_uid == tenant_uid, api_keys.c.key_id == key_id)
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(f"no API key {key_id}")
        return _key(row)
