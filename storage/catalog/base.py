"""What the catalog's parts share: the database, the clock, the request records."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import WeakValueDictionary

from sqlalchemy import ColumnElement, func, select, text, true

from storage.catalog.connections import Database, Statements
from storage.catalog.errors import (
    LeaseLostError,
    LimitReachedError,
    NotFoundError,
    RequestIdReusedError,
    RequestRepeatedError,
)
from storage.catalog.rows import MemoryState, RequestRecord
from storage.catalog.tables import leases, memories, requests, tenants

#: Most rows one page may hold; a caller's limit above it is cut.
MAX_PAGE = 1000
#: Values bound in one statement. SQLite and PostgreSQL allow 32,766.
MAX_BOUND = 10_000


Part = TypeVar("Part", bound="CatalogPart")
Params = ParamSpec("Params")
Result = TypeVar("Result")
Item = TypeVar("Item")
Method = Callable[Concatenate[Part, Params], Coroutine[Any, Any, Result]]


def reads(method: Method[Part, Params, Result]) -> Method[Part, Params, Result]:
    """Marks a method of the catalog that only queries."""
    return _run(method, writes=False)


def writes(method: Method[Part, Params, Result]) -> Method[Part, Params, Result]:
    """Marks a method of the catalog that may change rows."""
    return _run(method, writes=True)


def _run(method: Method[Part, Params, Result], *, writes: bool) -> Method[Part, Params, Result]:
    """Runs a method where it may block, and to its end: a caller who is cancelled
    meanwhile is cancelled after it.

    A connection that is cancelled in the middle of a statement is thrown away with
    its transaction open, and whoever waits for its locks waits for a timeout.
    Statements are short and the database's timeouts bound them.
    """

    @functools.wraps(method)
    async def run(part: Part, /, *args: Params.args, **kwargs: Params.kwargs) -> Result:
        task = asyncio.ensure_future(
            part._database.run(method(part, *args, **kwargs), writes=writes)
        )
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            # Its outcome is nobody's any more; looked at so that it is not reported as lost.
            task.cancelled() or task.exception()
            raise cancelled
        return task.result()

    return run


def wall_clock_us() -> int:
    """UTC now in microseconds."""
    return time.time_ns() // 1000


def new_uid() -> str:
    """A random 16-byte id as 32 hex digits."""
    return secrets.token_hex(16)


def slices(items: Sequence[Item], size: int = MAX_BOUND) -> Iterator[Sequence[Item]]:
    """Runs of at most `size`, to be bound in a statement each."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def page_size(limit: int) -> int:
    """Rows to return for a caller's `limit`. Raises ValueError below 1."""
    if limit < 1:
        raise ValueError(f"limit {limit} is below 1")
    return min(limit, MAX_PAGE)


class CatalogPart:
    """Base of the mixins that make up Catalog. Use Catalog.open, not this."""

    def __init__(self, database: Database, clock_us: Callable[[], int]) -> None:
        self._database = database
        self._clock_us = clock_us
        #: This server and its place, where several share the catalog; else empty.
        self._server_uid = ""
        self._place = ""
        #: The fence under which this server leads each of its tenants.
        self._fences: dict[str, int] = {}
        self._on_lease_lost: Callable[[str], None] | None = None
        #: Who adds to a tenant's audit trail, one after the other.
        self._trails: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def _led(self, tenant_uid: ColumnElement[str]) -> ColumnElement[bool]:
        """Tenants whose work is this server's: all, where it alone uses the catalog."""
        if not self._server_uid:
            return true()
        mine = select(leases.c.tenant_uid).where(leases.c.server_uid == self._server_uid)
        return tenant_uid.in_(mine)

    @asynccontextmanager
    async def _leading(
        self, *, tenant_uid: str = "", memory_uid: str = ""
    ) -> AsyncIterator[Statements]:
        """A transaction that writes what is a tenant's, named itself or by a memory.

        Where several servers share the catalog it commits only if this one still leads the
        tenant: the lease cannot change hands before it ends. Raises LeaseLostError.
        """
        async with self._database.writing() as connection:
            if self._server_uid:
                await self._require_lease(connection, tenant_uid, memory_uid)
            yield connection

    async def _require_lease(
        self, connection: Statements, tenant_uid: str, memory_uid: str
    ) -> None:
        owner = select(memories.c.tenant_uid).where(memories.c.uid == memory_uid)
        tenant = tenant_uid or owner.scalar_subquery()
        held = select(leases).where(leases.c.tenant_uid == tenant).with_for_update(read=True)
        lease = (await connection.execute(held)).one_or_none()
        if lease is None:
            known = select(tenants.c.uid).where(tenants.c.uid == tenant_uid)
            if (await connection.execute(known if tenant_uid else owner)).first() is None:
                return  # There is no such thing, as the caller is about to find.
        elif (lease.server_uid, lease.fence) == (
            self._server_uid,
            self._fences.get(lease.tenant_uid),
        ):
            return
        elif self._on_lease_lost is not None:
            self._on_lease_lost(lease.tenant_uid)
        raise LeaseLostError("another server leads the tenant")

    async def _keep_default_still(self, connection: Statements) -> None:
        """For who adds a memory: whoever changes the default model attaches either before the
        memory looks for it, or after the memory is there. The other side is
        attachments.keep_memories_out; like it before any row but a lease is locked, since two
        orders would be a deadlock.
        """
        if not self._database.is_sqlite:
            await connection.execute(text("LOCK TABLE memories IN ROW EXCLUSIVE MODE"))

    async def _keep_tenant(
        self, connection: Statements, tenant_uid: str, *, alone: bool = False
    ) -> None:
        """For who adds a memory: keeps the tenant from being deleted until this commits. Raises
        NotFoundError, also for one whose deletion has begun: it gets nothing more.

        alone: others who add one, alone too, wait until this commits.
        """
        living = (tenants.c.uid == tenant_uid, tenants.c.deleting_us.is_(None))
        query = select(tenants.c.uid).where(*living)
        query = query.with_for_update(read=not alone, key_share=alone)
        if (await connection.execute(query)).first() is None:
            raise NotFoundError(f"no tenant {tenant_uid}")

    async def _refuse_more(self, connection: Statements, tenant_uid: str, limit: int) -> None:
        """Raises LimitReachedError if the tenant has that many memories; 0 is no limit. For who
        keeps it alone.
        """
        if not limit:
            return
        living = memories.c.state != MemoryState.DELETING.value
        held = select(func.count()).where(memories.c.tenant_uid == tenant_uid, living)
        if (await connection.execute(held)).scalar_one() >= limit:
            raise LimitReachedError(limit)

    async def _find_request(
        self, connection: Statements, tenant_uid: str, request_id: str
    ) -> RequestRecord | None:
        columns = (requests.c.request_id, requests.c.method, requests.c.fingerprint)
        found = await connection.execute(
            select(*columns, requests.c.reply, requests.c.memory_uid).where(
                requests.c.tenant_uid == tenant_uid, requests.c.request_id == request_id
            )
        )
        row = found.one_or_none()
        return RequestRecord(**row._mapping) if row is not None else None

    async def _refuse_repeated(
        self, connection: Statements, tenant_uid: str, request: RequestRecord | None
    ) -> None:
        """Raises RequestRepeatedError or RequestIdReusedError if the id was served."""
        if request is None:
            return
        first = await self._find_request(connection, tenant_uid, request.request_id)
        if first is None:
            return
        if not first.answers(request):
            raise RequestIdReusedError(f"request id {request.request_id} was used before")
        raise RequestRepeatedError(first)

    async def _record_request(
        self, connection: Statements, tenant_uid: str, request: RequestRecord | None
    ) -> None:
        """Stores the reply with the change it answers; the unique key settles races.

        On PostgreSQL the insert waits for a concurrent one of the same id to end.
        """
        if request is None:
            return
        insert = self._database.insert(requests).values(
            tenant_uid=tenant_uid,
            request_id=request.request_id,
            method=request.method,
            fingerprint=request.fingerprint,
            reply=request.reply,
            memory_uid=request.memory_uid,
            created_us=self._clock_us(),
        )
        done = await connection.execute(insert.on_conflict_do_nothing())
        if done.rowcount != 1:
            await self._refuse_repeated(connection, tenant_uid, request)
