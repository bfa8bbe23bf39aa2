"""API keys: what a credential may do, and until when."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, Select, insert, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, page_size, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import AlreadyExistsError, ConflictError, NotFoundError
from storage.catalog.rows import ApiKeyRow, Cursor, Scope
from storage.catalog.tables import api_keys, tenants


def _key(row: Row[Any]) -> ApiKeyRow:
    held = json.loads(row.memories) if row.memories is not None else None
    return ApiKeyRow(**{**row._mapping, "scope": Scope(row.scope), "memories": held})


def _keys() -> Select[Any]:
    return select(api_keys, tenants.c.tenant_id).join(tenants)


def _memories(memories: Mapping[str, str] | None) -> str | None:
    return json.dumps(dict(memories), sort_keys=True) if memories is not None else None


class ApiKeys(CatalogPart):
    """API keys."""

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
        memories: Mapping[str, str] | None = None,
    ) -> ApiKeyRow:
        """Stores a key's digest. Raises AlreadyExistsError, or NotFoundError (tenant).

        memories: ids by uid of those it reaches; None for all of the tenant's.
        """
        values = {
            "key_id": key_id,
            "tenant_uid": tenant_uid,
            "display_name": display_name,
            "scope": scope.value,
            "operator": operator,
            "digest": digest,
            "created_us": self._clock_us(),
            "expires_us": expires_us,
            "memories": _memories(memories),
        }
        async with self._database.writing() as connection:
            known = select(tenants.c.uid).where(tenants.c.uid == tenant_uid)
            if (await connection.execute(known.with_for_update(read=True))).first() is None:
                raise NotFoundError(f"no tenant {tenant_uid}")
            return await self._insert_key(connection, values)

    async def _insert_key(self, connection: Statements, values: dict[str, Any]) -> ApiKeyRow:
        try:
            await connection.execute(insert(api_keys).values(values))
        except IntegrityError as error:
            raise AlreadyExistsError(f"API key {values['key_id']} exists") from error
        query = _keys().where(api_keys.c.key_id == values["key_id"])
        return _key((await connection.execute(query)).one())

    @reads
    async def find_api_key(self, key_id: str, tenant_uid: str | None = None) -> ApiKeyRow | None:
        """The key (with tenant_uid: of that tenant), revoked and expired ones included, or None.

        A tenant that is being deleted has none.
        """
        query = _keys().where(api_keys.c.key_id == key_id, tenants.c.deleting_us.is_(None))
        if tenant_uid is not None:
            query = query.where(api_keys.c.tenant_uid == tenant_uid)
        async with self._database.reading() as connection:
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
        """Revokes a key of this tenant now; a second time changes nothing. Raises NotFoundError."""
        now = self._clock_us()
        async with self._leading(tenant_uid=tenant_uid) as connection:
            await connection.execute(
                update(api_keys)
                .where(
                    api_keys.c.tenant_uid == tenant_uid,
                    api_keys.c.key_id == key_id,
                    or_(api_keys.c.revoked_us.is_(None), api_keys.c.revoked_us > now),
                )
                .values(revoked_us=now)
            )
            query = _keys().where(api_keys.c.tenant_uid == tenant_uid, api_keys.c.key_id == key_id)
            row = (await connection.execute(query)).one_or_none()
        if row is None:
            raise NotFoundError(f"no API key {key_id}")
        return _key(row)

    @writes
    async def rotate_api_key(
        self,
        tenant_uid: str,
        key_id: str,
        *,
        new_key_id: str,
        digest: bytes,
        grace_us: int,
        expires_us: int | None,
    ) -> tuple[ApiKeyRow, ApiKeyRow]:
        """Makes a key that may do what an old one may, and ends the old one, in one step.

        grace_us: until the old one is revoked; 0 is now. expires_us: of the
        new one; None for as long a life as the old one was made for. Returns the new one
        and the old one. Raises NotFoundError, ConflictError (the old one is no longer
        good), AlreadyExistsError.
        """
        named = (api_keys.c.tenant_uid == tenant_uid, api_keys.c.key_id == key_id)
        async with self._leading(tenant_uid=tenant_uid) as connection:
            # Two rotations at once are two keys, one after the other.
            lock = select(api_keys).where(*named).with_for_update()
            old = (await connection.execute(lock)).one_or_none()
            if old is None:
                raise NotFoundError(f"no API key {key_id}")
            now = self._clock_us()
            if any(end is not None and end <= now for end in (old.revoked_us, old.expires_us)):
                raise ConflictError(f"API key {key_id} is revoked or has expired")
            if expires_us is None and old.expires_us is not None:
                expires_us = now + old.expires_us - old.created_us
            values = {**old._mapping, "key_id": new_key_id, "digest": digest}
            values |= {"created_us": now, "expires_us": expires_us, "revoked_us": None}
            made = await self._insert_key(connection, values)
            ends = now + grace_us if old.revoked_us is None else min(now + grace_us, old.revoked_us)
            await connection.execute(update(api_keys).where(*named).values(revoked_us=ends))
            query = _keys().where(*named)
            return made, _key((await connection.execute(query)).one())
