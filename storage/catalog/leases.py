"""Who leads which tenant, where several server processes share one catalog.

A server has a row that it renews; by the database's clock it ends at expires_us. A tenant's
lease names its server and a fence, which counts the changes of hands. Leases have no time of
their own: they live as long as their server, so a heartbeat is one row however many tenants.

A server is taken for alive while its row is there, if it is at this server's own place (one
host, one data folder): there its lock says whether it lives, and whoever finds the lock free
buries it. One at another place is taken for alive until its row ends.

What makes a mistake about that harmless is the fence: every transaction that writes what is
a tenant's holds the lease's row, and rolls back unless server and fence are those it was
given (`CatalogPart._leading`). While one is under way the lease is in use and not to be had:
a claim comes before it or after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    and_,
    cast,
    delete,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)

from storage.catalog.base import CatalogPart, page_size, reads, writes
from storage.catalog.connections import Statements
from storage.catalog.errors import NotFoundError
from storage.catalog.rows import TenantRow
from storage.catalog.tables import leases, servers, tenants

#: A server's row is kept for so long after its end, for those who ask who led a tenant.
_KEPT_US = 86_400_000_000


class Leases(CatalogPart):
    """This server's own row, and the tenants it leads."""

    def lead_as(
        self, server_uid: str, place: str, on_lost: Callable[[str], None] | None = None
    ) -> None:
        """From now on this catalog writes what is a tenant's only while it leads the tenant.

        place: host and data folder, the same for every server whose lock can be asked.
        on_lost: told of each tenant for which a write was refused, before it raises.
        """
        self._server_uid = server_uid
        self._place = place
        self._on_lease_lost = on_lost

    @writes
    async def renew_server(self, lease_s: float) -> set[str]:
        """Says that this server lives, for lease_s from now.

        Returns the tenants that it no longer leads: taken by another one, or deleted.
        """
        known = dict(self._fences)
        now = self._now_us()
        values: dict[str, Any] = {
            "uid": self._server_uid,
            "place": self._place,
            "expires_us": now + round(lease_s * 1e6),
        }
        renew = self._database.insert(servers).values(values)
        renew = renew.on_conflict_do_update(
            index_elements=["uid"], set_={"expires_us": values["expires_us"]}
        )
        mine = leases.c.server_uid == self._server_uid
        async with self._database.writing() as connection:
            await connection.execute(renew)
            count = select(func.count()).select_from(leases).where(mine)
            if (await connection.execute(count)).scalar_one() == len(known):
                return set()
            rows = await connection.execute(select(leases).where(mine))
            held = {row.tenant_uid: row.fence for row in rows}
        lost = {uid for uid, fence in known.items() if held.get(uid) != fence}
        for tenant_uid in lost:
            del self._fences[tenant_uid]
        return lost

    @writes
    async def leave(self) -> None:
        """Gives up every lease at once: other servers may take the tenants."""
        async with self._database.writing() as connection:
            await connection.execute(delete(servers).where(servers.c.uid == self._server_uid))

    @writes
    async def claim_tenant(self, tenant_uid: str) -> TenantRow | None:
        """Leads the tenant from now on; leading it already is no error.

        None while another server that is taken for alive does. Raises NotFoundError.
        """
        async with self._database.writing() as connection:
            # Keeps the tenant from being deleted meanwhile.
            wanted = select(tenants).where(tenants.c.uid == tenant_uid)
            tenant = (await connection.execute(wanted.with_for_update(read=True))).one_or_none()
            if tenant is None:
                raise NotFoundError(f"no tenant {tenant_uid}")
            fence = await self._take(connection, tenant_uid)
        if fence is None:
            return None
        self._fences[tenant_uid] = fence
        return TenantRow(**tenant._mapping)

    async def _take(self, connection: Statements, tenant_uid: str) -> int | None:
        first = {"tenant_uid": tenant_uid, "server_uid": self._server_uid, "fence": 1}
        insert = self._database.insert(leases).values(first)
        await connection.execute(insert.on_conflict_do_nothing())
        which = leases.c.tenant_uid == tenant_uid
        free = select(leases).where(which).with_for_update(skip_locked=True)
        held = (await connection.execute(free)).one_or_none()
        if held is None:
            return None  # Somebody commits under it right now.
        if held.server_uid == self._server_uid:
            return int(held.fence)
        alive = select(servers.c.uid).where(servers.c.uid == held.server_uid, self._alive())
        if (await connection.execute(alive)).first() is not None:
            return None
        fence = int(held.fence) + 1
        mine = {"server_uid": self._server_uid, "fence": fence}
        await connection.execute(update(leases).where(which).values(mine))
        return fence

    @reads
    async def unled_tenants(self, limit: int) -> list[TenantRow]:
        """Tenants that no server leads which is taken for alive, the oldest first."""
        led = exists().where(
            leases.c.tenant_uid == tenants.c.uid,
            servers.c.uid == leases.c.server_uid,
            self._alive(),
        )
        query = select(tenants).where(~led).order_by(tenants.c.created_us, tenants.c.uid)
        async with self._database.reading() as connection:
            rows = await connection.execute(query.limit(page_size(limit)))
            return [TenantRow(**row._mapping) for row in rows]

    @reads
    async def servers_here(self) -> list[str]:
        """Uids of the other servers at this server's place, alive or dead."""
        others = and_(servers.c.place == self._place, servers.c.uid != self._server_uid)
        async with self._database.reading() as connection:
            found = await connection.execute(select(servers.c.uid).where(others))
            return list(found.scalars())

    @writes
    async def bury_servers(self, uids: Collection[str]) -> None:
        """Forgets servers whose processes have ended, and what ended long ago elsewhere."""
        long_ago = servers.c.expires_us < self._now_us() - _KEPT_US
        elsewhere = and_(servers.c.place != self._place, long_ago)
        async with self._database.writing() as connection:
            dead = or_(servers.c.uid.in_(list(uids)), elsewhere)
            await connection.execute(delete(servers).where(dead))

    def _alive(self) -> ColumnElement[bool]:
        return or_(servers.c.place == self._place, servers.c.expires_us > self._now_us())

    def _now_us(self) -> ColumnElement[int]:
        """The database's clock: servers need not agree on the time."""
        if self._database.is_sqlite:
            return literal(self._clock_us(), BigInteger)
        return cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)
