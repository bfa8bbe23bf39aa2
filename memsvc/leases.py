"""Which tenants this server leads: all of them, or those it has claimed from a shared catalog.

Every call that touches a tenant's data passes `require` first. A tenant is claimed when it is
first asked for, or when nobody has it; then it is reconciled, as after a crash, and led until
this server ends. A tenant that another one leads is refused with SERVED_ELSEWHERE.

What keeps two servers from writing for one tenant (docs/adr/0016-a-tenant-has-one-server.md):

    its lock            a server on this host that lives, even stopped, is never taken from
    the row's end       one elsewhere is taken from when it has not renewed it in time
    the fence           no transaction of a server that was taken from commits
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from memsvc import errors
from memsvc.places import Place, bury
from storage.catalog import Catalog, CatalogError, NotFoundError, TenantRow
from storage.store import StorageError

log = logging.getLogger(__name__)

#: Beats in the time of a lease: two may fail.
_BEATS = 3
_PAGE = 100

#: Makes ready to lead a tenant; puts away what is held of one that was lost.
TakeOver = Callable[[TenantRow], Awaitable[None]]
Lost = Callable[[str], Awaitable[None]]


class Leading(ABC):
    """What the rest of the server asks."""

    @abstractmethod
    def leads(self, tenant_uid: str) -> bool:
        """Whether this server leads the tenant now."""

    @abstractmethod
    async def require(self, tenant_uid: str) -> None:
        """Returns when this server leads the tenant. Raises SERVED_ELSEWHERE."""


class SoleServer(Leading):
    """No other process uses the catalog: this one leads every tenant."""

    def leads(self, tenant_uid: str) -> bool:
        """Always."""
        return True

    async def require(self, tenant_uid: str) -> None:
        """At once."""


class Leases(Leading):
    """Tenants claimed from a catalog that other servers use as well."""

    def __init__(self, catalog: Catalog, place: Place, lease_s: float) -> None:
        """lease_s: how long this server is taken for alive when it is not heard of."""
        self._catalog = catalog
        self._place = place
        self._lease_s = lease_s
        self._held: set[str] = set()
        self._lost: set[str] = set()
        # Claimed, but not reconciled: something failed.
        self._unready: set[str] = set()
        self._taking: dict[str, asyncio.Task[bool]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, take_over: TakeOver, lost: Lost) -> None:
        """Claims every tenant that nobody leads; goes on to look for such ones."""
        self._take_over = take_over
        self._on_lost = lost
        self._catalog.lead_as(self._place.uid, self._place.name, self._fenced)
        await self._renew()
        self._tasks.append(asyncio.create_task(self._keep(self._renew)))
        await self._sweep()
        self._tasks.append(asyncio.create_task(self._keep(self._sweep)))

    async def stop(self) -> None:
        """Claims nothing more; what is led stays so until `close`, with no more beats."""
        tasks = [*self._tasks, *self._taking.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()

    async def close(self) -> None:
        """Gives up all leases. Nothing may be written for a tenant any more."""
        self._held.clear()
        try:
            await self._catalog.leave()
        except CatalogError as error:
            # They are given up with the lock, too.
            log.warning("leases not given up", extra={"fault": type(error).__name__})

    def leads(self, tenant_uid: str) -> bool:
        """See Leading."""
        return tenant_uid in self._held

    async def require(self, tenant_uid: str) -> None:
        """See Leading. Claims a tenant that nobody leads; also raises what reconciling it does."""
        if tenant_uid not in self._held and not await self._take(tenant_uid):
            raise errors.served_elsewhere()

    async def _take(self, tenant_uid: str) -> bool:
        """Whether the tenant is led now. Who asks at once waits for one attempt."""
        task = self._taking.get(tenant_uid)
        if task is None:
            task = asyncio.create_task(self._claim(tenant_uid))
            self._taking[tenant_uid] = task
            task.add_done_callback(lambda done: self._taken(tenant_uid, done))
        return await asyncio.shield(task)

    def _taken(self, tenant_uid: str, task: asyncio.Task[bool]) -> None:
        del self._taking[tenant_uid]
        if not task.cancelled():
            task.exception()  # Fetched, as whoever asked may be gone.

    async def _claim(self, tenant_uid: str) -> bool:
        # What this process knows of a tenant that was taken from it is out of date.
        if tenant_uid in self._lost:
            return False
        try:
            tenant = await self._catalog.claim_tenant(tenant_uid)
            if tenant is None and await self._bury_dead():
                tenant = await self._catalog.claim_tenant(tenant_uid)
        except NotFoundError:
            return False
        if tenant is None:
            return False
        self._unready.add(tenant_uid)
        await self._take_over(tenant)
        self._unready.discard(tenant_uid)
        self._held.add(tenant_uid)
        log.info("leads a tenant", extra={"tenant_uid": tenant_uid})
        return True

    async def _bury_dead(self) -> bool:
        """Whether there were servers here whose processes have ended."""
        here = await self._catalog.servers_here()
        root = self._place.data.root
        dead = [uid for uid in here if await asyncio.to_thread(bury, root, uid)]
        await self._catalog.bury_servers(dead)
        return bool(dead)

    async def _sweep(self) -> None:
        """Takes over what nobody leads: that of servers that ended, and what is new."""
        await self._bury_dead()
        for tenant_uid in list(self._unready):
            await self._try_take(tenant_uid)
        while rows := await self._catalog.unled_tenants(_PAGE):
            taken = [await self._try_take(row.uid) for row in rows if row.uid not in self._lost]
            if not any(taken):
                return

    async def _try_take(self, tenant_uid: str) -> bool:
        try:
            return await self._take(tenant_uid)
        except CatalogError:
            raise  # Of all tenants.
        except Exception as error:
            # What is wrong with one, be it its store or its keys, keeps no other from being led.
            log.error("cannot lead a tenant", extra={"tenant_uid": tenant_uid}, exc_info=error)
            return False

    def _fenced(self, tenant_uid: str) -> None:
        """A write was refused: the tenant is served no more. The next beat does the rest."""
        if tenant_uid in self._held:
            self._held.discard(tenant_uid)
            self._lost.add(tenant_uid)

    async def _renew(self) -> None:
        gone = await self._catalog.renew_server(self._lease_s)
        # Known of all of them before anything is done about one.
        self._held -= gone
        self._lost |= gone
        for tenant_uid in gone:
            log.warning("leads a tenant no longer", extra={"tenant_uid": tenant_uid})
            try:
                await self._on_lost(tenant_uid)
            except Exception as error:
                extra = {"tenant_uid": tenant_uid}
                log.error("what was held of a tenant stays", extra=extra, exc_info=error)

    async def _keep(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        while True:
            await asyncio.sleep(self._lease_s / _BEATS)
            try:
                await work()
            except (CatalogError, StorageError) as error:
                log.warning("leases: %s", type(error).__name__)
            except Exception as error:
                # The last beat would be the end of all leases.
                log.error("leases", exc_info=error)
