"""Quotas of single tenants, where they differ from the server's settings."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from storage.catalog.base import CatalogPart, reads, writes
from storage.catalog.errors import NotFoundError
from storage.catalog.tables import quotas, tenants


class Quotas(CatalogPart):
    """Limits by tenant and name. The names are the server's; here they are text."""

    @reads
    async def quotas(self, tenant_uid: str) -> dict[str, int]:
        """The tenant's own limits by name; empty for one that has none, or is not there."""
        query = select(quotas.c.name, quotas.c.most).where(quotas.c.tenant_uid == tenant_uid)
        async with self._database.reading() as connection:
            return {row.name: row.most for row in await connection.execute(query)}

    @writes
    async def set_quotas(self, tenant_uid: str, changes: Mapping[str, int]) -> None:
        """Sets limits by name; 0 takes one away. All of it or nothing. Raises NotFoundError."""
        mine = quotas.c.tenant_uid == tenant_uid
        kept = [
            {"tenant_uid": tenant_uid, "name": name, "most": most}
            for name, most in changes.items()
            if most
        ]
        async with self._leading(tenant_uid=tenant_uid) as connection:
            known = select(tenants.c.uid).where(tenants.c.uid == tenant_uid)
            if (await connection.execute(known.with_for_update(read=True))).first() is None:
                raise NotFoundError(f"no tenant {tenant_uid}")
            await connection.execute(delete(quotas).where(mine, quotas.c.name.in_(changes)))
            if kept:
                try:
                    await connection.execute(self._database.insert(quotas).values(kept))
                except IntegrityError as error:
                    raise NotFoundError(f"no tenant {tenant_uid}") from error
