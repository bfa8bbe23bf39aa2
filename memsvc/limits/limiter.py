"""Lets calls in: by tenant, and for the whole server."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import islice

from memsvc import errors
from memsvc.config import Config
from memsvc.limits.bucket import Bucket
from memsvc.limits.pool import FairPool
from memsvc.limits.quotas import Quotas
from memsvc.limits.turns import Turns
from memsvc.wire import METHODS

_MEMORY = "/memsvc.v1.MemoryService/"
#: Calls that hold a place in a worker while they last.
_QUERIES = frozenset({_MEMORY + "Query", _MEMORY + "Retrieve"})
#: Calls that cost a model's tokens, at once or later.
_COSTLY = _QUERIES | {_MEMORY + "AppendTurns", _MEMORY + "PutDocuments", _MEMORY + "ImportMemory"}
#: Calls that keep their place among those worked on until they end. The others wait for
#: something, their client or a worker, and take their turn to begin only.
_WORKED_ON = frozenset(
    path
    for path, method in METHODS.items()
    if not (method.client_streaming or method.server_streaming) and path not in _QUERIES
)
#: Tenants whose state is kept when they rest; of the rest a few are looked at a time.
_TENANTS_KEPT = 4096
_LOOKED_AT = 8

Load = Callable[[str], Awaitable[Mapping[str, int]]]


class _Rates:
    """Three buckets by the names of their quotas."""

    def __init__(self, requests: int, tokens: int, size: int, now: float, prefix: str = "") -> None:
        self.requests = Bucket(requests, now)
        self.tokens = Bucket(tokens, now)
        self.bytes = Bucket(size, now)
        self._prefix = prefix

    def exceeded(self, method: str, now: float) -> tuple[str, int, float] | None:
        """Name, limit and seconds to wait of the first bucket that lets nothing in."""
        asked = {"requests_per_minute": self.requests, "bytes_per_minute": self.bytes}
        if method in _COSTLY:
            asked["tokens_per_minute"] = self.tokens
        for name, bucket in asked.items():
            wait_s = bucket.wait_s(now)
            if wait_s:
                return self._prefix + name, bucket.per_minute, wait_s
        return None

    def rested(self, now: float) -> bool:
        """Whether nothing would be forgotten with it."""
        return all(bucket.full(now) for bucket in (self.requests, self.tokens, self.bytes))


class _Tenant:
    """What is known of a tenant that called lately."""

    def __init__(self, quotas: Quotas, now: float) -> None:
        self.calls = 0
        self.queries = 0
        self.renew(quotas, now)

    def renew(self, quotas: Quotas, now: float) -> None:
        """Other quotas; what is inside stays counted."""
        self.quotas = quotas
        self.rates = _Rates(
            quotas.requests_per_minute, quotas.tokens_per_minute, quotas.bytes_per_minute, now
        )


class Admission:
    """A call that was let in. Made by `Limiter.enter`."""

    def __init__(self, limiter: Limiter, tenant: _Tenant, uid: str, method: str) -> None:
        self._limiter = limiter
        self._tenant = tenant
        self._uid = uid
        self._method = method

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until it is this call's turn to be worked on, which the block does."""
        turn = self._limiter.turns.turn(self._uid)
        if self._method in _WORKED_ON:
            async with turn:
                yield
            return
        async with turn:
            pass
        yield

    @property
    def stream_seconds(self) -> int:
        """How long a stream may last. 0: no limit."""
        return self._tenant.quotas.stream_seconds

    @property
    def counts_bytes(self) -> bool:
        """Whether anybody wants to know how much is sent and received."""
        return any(bucket.per_minute for bucket in self._buckets())

    def spend_bytes(self, size: int) -> None:
        """So many were received, or are about to be sent."""
        now = self._limiter.clock()
        for bucket in self._buckets():
            bucket.spend(size, now)

    async def pace(self) -> None:
        """Returns when what was spent is paid back: a stream is slowed down, not refused."""
        now = self._limiter.clock()
        wait_s = max(bucket.wait_s(now) for bucket in self._buckets())
        if wait_s:
            await asyncio.sleep(wait_s)

    def _buckets(self) -> tuple[Bucket, Bucket]:
        return self._tenant.rates.bytes, self._limiter.server.bytes


class Limiter:
    """All limits on calls of one server.

    load: a tenant's own quotas, by name; asked once, until `forget`.
    """

    def __init__(
        self, config: Config, load: Load, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self.server = _Rates(
            config.server_requests_per_minute,
            config.server_tokens_per_minute,
            config.server_bytes_per_minute,
            clock(),
            "server_",
        )
        self._config = config
        self._load = load
        self._calls = FairPool(config.max_concurrent_calls)
        self.turns = Turns(config.concurrent_work, config.tenant_work_share, clock)
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._stale: set[str] = set()
        self._forgotten = 0

    async def quotas(self, tenant_uid: str) -> Quotas:
        """What the tenant may use."""
        return (await self._tenant(tenant_uid)).quotas

    def forget(self, tenant_uid: str) -> None:
        """The tenant's quotas were changed, or it was deleted."""
        self._stale.add(tenant_uid)
        self._forgotten += 1

    def spend_tokens(self, tenant_uid: str, amount: int) -> None:
        """A model read or wrote so many for the tenant."""
        now = self.clock()
        self.server.tokens.spend(amount, now)
        tenant = self._tenants.get(tenant_uid)
        if tenant is not None:
            tenant.rates.tokens.spend(amount, now)

    @asynccontextmanager
    async def enter(self, tenant_uid: str, method: str) -> AsyncIterator[Admission]:
        """Counts a call for as long as the block lasts.

        method: the call's path. Raises QUOTA_EXCEEDED naming the quota, OVERLOADED.
        """
        tenant = await self._tenant(tenant_uid)
        self._check(tenant, method)
        self._calls.take(tenant_uid)
        query = method in _QUERIES
        tenant.calls += 1
        tenant.queries += query
        now = self.clock()
        for rates in (tenant.rates, self.server):
            rates.requests.spend(1, now)
        try:
            yield Admission(self, tenant, tenant_uid, method)
        finally:
            tenant.calls -= 1
            tenant.queries -= query
            self._calls.give(tenant_uid)

    def _check(self, tenant: _Tenant, method: str) -> None:
        now, quotas = self.clock(), tenant.quotas
        exceeded = tenant.rates.exceeded(method, now)
        if exceeded is not None:
            name, limit, wait_s = exceeded
            raise errors.quota_exceeded(name, limit, wait_s)
        for name, limit, inside in (
            ("concurrent_calls", quotas.concurrent_calls, tenant.calls),
            ("concurrent_queries", quotas.concurrent_queries, tenant.queries),
        ):
            counts = name == "concurrent_calls" or method in _QUERIES
            if limit and counts and inside >= limit:
                raise errors.quota_exceeded(name, limit, 1.0)
        exceeded = self.server.exceeded(method, now)
        if exceeded is not None:
            name, _, wait_s = exceeded
            raise errors.overloaded(wait_s, name)

    async def _tenant(self, tenant_uid: str) -> _Tenant:
        """Its state; quotas are read when it is new, or when they were changed."""
        while True:
            known = self._tenants.get(tenant_uid)
            if known is not None and tenant_uid not in self._stale:
                self._tenants.move_to_end(tenant_uid)
                return known
            forgotten = self._forgotten
            own = await self._load(tenant_uid)
            if forgotten != self._forgotten:
                continue  # Changed again while they were read.
            if tenant_uid in self._stale or tenant_uid not in self._tenants:
                # Else another call has read them, too.
                self._stale.discard(tenant_uid)
                self._keep(tenant_uid, Quotas.resolve(self._config, own))

    def _keep(self, tenant_uid: str, quotas: Quotas) -> None:
        now = self.clock()
        known = self._tenants.get(tenant_uid)
        if known is not None:
            known.renew(quotas, now)
        else:
            self._tenants[tenant_uid] = _Tenant(quotas, now)
        for oldest in list(islice(self._tenants, _LOOKED_AT)):
            idle = self._tenants[oldest]
            if len(self._tenants) <= _TENANTS_KEPT:
                return
            if not idle.calls and idle.rates.rested(now):
                del self._tenants[oldest]
