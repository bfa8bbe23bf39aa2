"""Workers that said themselves that they are there.

A worker registers and repeats it as a heartbeat. It is dropped once its lease has run out
and it cannot be reached either: one that answers is not dropped for a lost heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from memsvc import errors
from memsvc.workers.endpoint import Announce, RemoteEndpoint, Withdraw

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
#: Heartbeats that may be lost.
_LOST = 3
MAX_REGISTERED = 1000
MAX_ADDRESS = 256


@dataclass
class _Lease:
    endpoint: RemoteEndpoint
    task: asyncio.Task[None]
    until: float


class Registered:
    """Endpoints of registered workers, by address."""

    def __init__(
        self,
        announce: Announce,
        withdraw: Withdraw,
        clock: Callable[[], float] = time.monotonic,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._announce = announce
        self._withdraw = withdraw
        self._clock = clock
        self._leases: dict[str, _Lease] = {}

    @property
    def endpoints(self) -> list[RemoteEndpoint]:
        """Of the workers that are there, or were a moment ago."""
        return [lease.endpoint for lease in self._leases.values()]

    async def renew(self, address: str) -> None:
        """A heartbeat; the first one makes an endpoint. Raises TOO_MANY_ITEMS."""
        until = self._clock() + _LOST * HEARTBEAT_S
        lease = self._leases.get(address)
        if lease is not None and not lease.endpoint.retired:
            lease.until = until
            return
        if lease is not None:
            # It went down and is back.
            await self._drop(address)
        await self.expire()
        if address in self._leases:
            return
        if len(self._leases) >= MAX_REGISTERED:
            raise errors.too_many_items(
                "address", limit=MAX_REGISTERED, actual=len(self._leases) + 1
            )
        endpoint = RemoteEndpoint(address, self._announce, self._withdraw, self._credentials)
        self._leases[address] = _Lease(endpoint, asyncio.create_task(endpoint.run()), until)
        log.info("worker at %s has registered", address)

    def leave(self, address: str) -> None:
        """The worker goes down: nothing new goes to it. Unknown addresses are no error."""
        lease = self._leases.get(address)
        if lease is not None:
            lease.endpoint.retire()
            lease.until = self._clock()

    async def expire(self) -> None:
        """Drops those whose lease has run out and that cannot be reached."""
        for address in list(self._leases):
            # Looked at now: a heartbeat may have come while another one was dropped.
            lease = self._leases.get(address)
            if lease is None or lease.until > self._clock() or lease.endpoint.attached:
                continue
            log.info("worker at %s is gone", address)
            await self._drop(address)

    async def watch(self) -> None:
        """Expires leases until cancelled."""
        while True:
            await asyncio.sleep(HEARTBEAT_S / 2)
            await self.expire()

    async def close(self) -> None:
        """Leaves all workers to themselves."""
        for address in list(self._leases):
            await self._drop(address)

    async def _drop(self, address: str) -> None:
        lease = self._leases.pop(address, None)
        if lease is not None:
            lease.task.cancel()
            await asyncio.gather(lease.task, return_exceptions=True)
