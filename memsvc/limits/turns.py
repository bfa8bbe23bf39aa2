"""Whose call is worked on next: few at once, tenants in turn, one that floods last.

A call that was let in is not worked on at once. It takes a place first, and there are
few: what runs at the same time in one process only delays each other. While a lighter one is
about, a tenant that comes near its share has its calls worked on one by one, goes on with them
between the lighter one's, and one that does more than its share waits, with its own calls and
in no one else's way; a tenant that is alone is held back by nothing but the places.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import islice

from memsvc.limits.pool import FairPool

#: A tenant is about for so long after its last call.
_ABOUT_S = 1.0
#: What was done so long ago counts for a third of what is done now.
_MEMORY_S = 0.25
#: A tenant is lighter than one that wants so many times as much. Under a flood everything takes
#: longer: who only seems to use as much must not be held back with the one that floods.
_LIGHTER = 2
#: A tenant that wants this part of its share has its calls worked on one by one: several at once
#: delay a lighter one's by as much, however little they are over a second.
_NEAR = 0.5
#: ... and the next does not wait longer than this for the one before it, which may take long.
_APART_S = 0.05
#: ... nor for a lighter one's, of the first so many seconds: what it does next would take
#: processors, interpreter and disk from that call.
_ASIDE_S = 0.025
#: Weight of the newest call in what a tenant's next one is expected to take.
_NEWEST = 0.2
_FIRST_GUESS_S = 0.005
_LOOKED_AT = 8


class _Tenant:
    """What one tenant does. expected_s: what a call of it takes, as far as is known."""

    def __init__(self, now: float) -> None:
        self.waiting: deque[asyncio.Future[float]] = deque()
        self.inside = 0
        self.began = self.left = now
        self.turn = 0
        self.seen = now
        self.expected_s = _FIRST_GUESS_S
        self._worked_s = 0.0
        self._at = now

    def work(self, seconds: float, now: float) -> None:
        """So much was done, or is about to be; negative: less than was expected."""
        self._worked_s = max(0.0, self._recent_s(now) + seconds)
        self._at = now

    def use(self, now: float) -> float:
        """Seconds of work in a second, of late."""
        return self._recent_s(now) / _MEMORY_S

    def demand(self, now: float) -> float:
        """As `use`, with what stands in line: who is held back is no lighter for that."""
        return self.use(now) + len(self.waiting) * self.expected_s / _MEMORY_S

    def about(self, now: float) -> bool:
        """Whether it has anything going on, or had just now."""
        return bool(self.waiting or self.inside) or now - self.seen < _ABOUT_S

    def _recent_s(self, now: float) -> float:
        return self._worked_s * math.exp((self._at - now) / _MEMORY_S)


class Turns:
    """places: calls worked on at once. share: seconds of work in a second that a tenant may
    do while a lighter one is about; 0: any. For one event loop.
    """

    def __init__(
        self, places: int, share: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool = FairPool(places)
        self._share = share
        self._clock = clock
        # The one seen longest ago first.
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._in_line: dict[str, _Tenant] = {}
        self._aside: list[asyncio.Future[None]] = []
        self._turn = 0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        """Calls that stand in line."""
        return sum(len(tenant.waiting) for tenant in self._in_line.values())

    @asynccontextmanager
    async def turn(self, uid: str) -> AsyncIterator[None]:
        """Waits for a place; the block is the work. Leaving while waiting costs nothing."""
        tenant = self._seen(uid)
        expected_s = await self._place(uid, tenant)
        started = self._clock()
        try:
            yield
        finally:
            took_s = self._clock() - started
            tenant.expected_s += _NEWEST * (took_s - tenant.expected_s)
            self._leave(uid, tenant, took_s - expected_s)

    async def worked(self, uid: str, seconds: float) -> None:
        """So much was done for the tenant without a place, in a thread of its own; returns when
        it is its turn to do more, in line with the tenant's calls.
        """
        tenant = self._seen(uid)
        tenant.work(seconds, self._clock())
        expected_s = await self._place(uid, tenant)
        self._leave(uid, tenant, -expected_s)

    async def step(self, uid: str) -> None:
        """Awaited between two steps of a call that is worked on, or of what came of it: a tenant
        that comes near its share lets lighter ones' calls end first.
        """
        deadline = self._clock() + _ASIDE_S
        while (tenant := self._tenants.get(uid)) is not None:
            now = self._clock()
            wait_s = min(deadline - now, self._in_the_way_s(tenant, now))
            if wait_s <= 0:
                return
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._aside.append(ended)
            await asyncio.wait([ended], timeout=wait_s)

    def _seen(self, uid: str) -> _Tenant:
        now = self._clock()
        for oldest in list(islice(self._tenants, _LOOKED_AT)):
            if not self._tenants[oldest].about(now):
                del self._tenants[oldest]
        tenant = self._tenants.setdefault(uid, _Tenant(now))
        tenant.seen = now
        self._tenants.move_to_end(uid)
        return tenant

    async def _place(self, uid: str, tenant: _Tenant) -> float:
        """Returns when the call may begin, with the seconds it was expected to take."""
        place: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        tenant.waiting.append(place)
        self._in_line[uid] = tenant
        self._advance()
        try:
            return await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._give_up(uid, tenant, place)
            else:
                # Its caller left in the moment it was given.
                self._leave(uid, tenant, -place.result())
            raise

    def _give_up(self, uid: str, tenant: _Tenant, place: asyncio.Future[float]) -> None:
        if place in tenant.waiting:
            tenant.waiting.remove(place)
        if not tenant.waiting:
            self._in_line.pop(uid, None)

    def _leave(self, uid: str, tenant: _Tenant, unexpected_s: float) -> None:
        now = self._clock()
        tenant.work(unexpected_s, now)
        tenant.inside -= 1
        tenant.seen = tenant.left = now
        for ended in self._aside:
            ended.set_result(None)
        self._aside.clear()
        self._pool.give(uid)
        self._advance()

    def _advance(self) -> None:
        """Gives places to those whose turn it is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._clock()
        while (ready := self._ready(now)) is not None:
            uid, tenant = ready
            place = tenant.waiting.popleft()
            if not tenant.waiting:
                del self._in_line[uid]
            if place.cancelled():
                # Its caller has left and is told of it in a moment.
                continue
            self._turn += 1
            tenant.turn = self._turn
            tenant.inside += 1
            tenant.began = now
            tenant.work(tenant.expected_s, now)
            self._pool.take(uid)
            place.set_result(tenant.expected_s)

    def _ready(self, now: float) -> tuple[str, _Tenant] | None:
        """The tenant whose next call begins now; None: nobody's."""
        ready: list[tuple[str, _Tenant]] = []
        waits_s: list[float] = []
        for uid, tenant in self._in_line.items():
            if not self._pool.has_room(uid):
                continue
            wait_s = (
                self._wait_s(tenant, now)
                or self._apart_s(tenant, now)
                or self._aside_s(tenant, now)
            )
            if wait_s:
                waits_s.append(wait_s)
            else:
                ready.append((uid, tenant))
        if ready:
            return min(ready, key=lambda one: (one[1].inside, one[1].turn))
        if waits_s:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(min(waits_s), self._advance)
        return None

    def _wait_s(self, tenant: _Tenant, now: float) -> float:
        """Seconds for which the tenant is held back."""
        use = tenant.use(now)
        if not self._share or use <= self._share or not self._outweighs(tenant, now):
            return 0.0
        return max(_MEMORY_S * math.log(use / self._share), 0.001)

    def _apart_s(self, tenant: _Tenant, now: float) -> float:
        """Seconds for which the tenant's next call waits for the end of the one before it."""
        left_s = tenant.began + _APART_S - now
        if not tenant.inside or left_s <= 0:
            return 0.0
        if not self._near(tenant, now) or not self._outweighs(tenant, now):
            return 0.0
        return max(left_s, 0.001)

    def _aside_s(self, tenant: _Tenant, now: float) -> float:
        """Seconds for which the tenant's next call waits for lighter ones' calls."""
        own_s = max(tenant.began, tenant.left) + _ASIDE_S - now
        return max(0.0, min(own_s, self._in_the_way_s(tenant, now)))

    def _in_the_way_s(self, tenant: _Tenant, now: float) -> float:
        """Seconds for which the tenant, which comes near its share, is in the way of calls of
        lighter ones that are worked on. One that takes long is not in a hurry.
        """
        if not self._near(tenant, now):
            return 0.0
        began = [one.began for one in self._lighter(tenant, now) if one.inside]
        return max(0.0, max(began) + _ASIDE_S - now) if began else 0.0

    def _near(self, tenant: _Tenant, now: float) -> bool:
        """Whether the tenant comes near its share."""
        return bool(self._share) and tenant.demand(now) > _NEAR * self._share

    def _outweighs(self, tenant: _Tenant, now: float) -> bool:
        """Whether a lighter tenant is about."""
        return any(lighter.about(now) for lighter in self._lighter(tenant, now))

    def _lighter(self, tenant: _Tenant, now: float) -> Iterator[_Tenant]:
        demand = tenant.demand(now)
        for other in self._tenants.values():
            if other is not tenant and other.demand(now) * _LIGHTER < demand:
                yield other
