"""One place where a worker is, or should be: kept attached, told about evictions.

An endpoint loops: attach, learn what is served, announce it, watch, and when the
worker is lost, try again with growing pauses. A supervised endpoint owns the
process; a remote one only has its address.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import grpc

from memsvc.api_error import ApiError
from memsvc.workers.client import WorkerClient
from memsvc.workers.failures import WorkerFaultError
from memsvc.workers.supervisor import (
    SocketPlace,
    WorkerCommand,
    WorkerProcess,
    WorkerStartError,
)
from model_adapter.v1 import model_adapter_pb2 as pb

log = logging.getLogger(__name__)

#: A supervised worker that ends sooner than this after it served counts as failing.
_STEADY_S = 30.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_LAST_S = 30.0

_INFO_TIMEOUT_S = 30.0
_PROBE_EVERY_S = 5.0
#: After a probe that failed.
_PROBE_AGAIN_S = 0.5
_PROBE_TIMEOUT_S = 10.0
_PROBES_FAILED = 3

_EVICT_TIMEOUT_S = 10.0
_EVERYTHING = ("", "")
#: Evictions owed to an unreachable worker; past this they are owed per tenant.
_MAX_OWED = 10_000

Announce = Callable[["Endpoint", WorkerClient, pb.GetInfoResponse], Awaitable[None]]
Withdraw = Callable[["Endpoint"], None]


class Endpoint(ABC):
    """Keeps one worker attached for as long as `run` runs."""

    def __init__(self, announce: Announce, withdraw: Withdraw) -> None:
        self._announce = announce
        self._withdraw = withdraw
        self._client: WorkerClient | None = None
        self._owed: set[tuple[str, str]] = set()
        self._suspect = asyncio.Event()
        #: What the worker said last; None until it has.
        self.info: pb.GetInfoResponse | None = None
        #: The worker said that it goes down.
        self.retired = False

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the worker is, or will be."""

    @property
    def attached(self) -> bool:
        """Whether the worker answers now."""
        return self._client is not None

    @property
    def knows_filters(self) -> bool:
        """Whether the worker heeds a request's filter."""
        return self.info is not None and self.info.filters

    @property
    def knows_removals(self) -> bool:
        """Whether the worker heeds what a request says is deleted."""
        return self.info is not None and self.info.removals

    @abstractmethod
    def _connect(self) -> AbstractAsyncContextManager[WorkerClient]:
        """A connected client; leaving ends what was started."""

    @abstractmethod
    async def _lost(self) -> None:
        """Returns when the worker is known to be gone, other than by probing."""

    @abstractmethod
    def _after_failed_evict(self, tenant: str, memory_uid: str) -> None:
        """Sees to it that the worker will not keep what could not be evicted."""

    def suspect(self) -> None:
        """A call failed as if the worker were gone or changed: look now, not at the next probe."""
        self._suspect.set()

    def retire(self) -> None:
        """The worker goes down: nothing new goes to it, what it has it may finish."""
        self.retired = True
        self._withdraw(self)

    async def evict(self, tenant: str, memory_uid: str) -> bool:
        """When it returns the worker holds nothing of the memory, or can't be asked for it.
        Whether the worker has said so.

        A worker that doesn't answer is handled by the kind of endpoint: a
        supervised one is killed, a remote one evicts before it is used again.
        """
        client = self._client
        if client is None:
            self._owe(tenant, memory_uid)
            return False
        try:
            await client.evict(tenant, memory_uid, _EVICT_TIMEOUT_S)
        except (ApiError, WorkerFaultError) as error:
            log.warning("evict failed: %s", error)
            self._after_failed_evict(tenant, memory_uid)
            return False
        return True

    async def run(self) -> None:
        """Loops until cancelled."""
        backoff_s = _BACKOFF_FIRST_S
        while True:
            started = time.monotonic()
            try:
                async with self._connect() as client:
                    await self._serve(client)
            except WorkerStartError as error:
                log.error("worker: %s", error)
                if error.hopeless:
                    backoff_s = _BACKOFF_LAST_S
            except (WorkerFaultError, ApiError, OSError) as error:
                log.warning("worker lost: %s", error)
            except Exception as error:
                log.error("worker lost", exc_info=error)
            if time.monotonic() - started > _STEADY_S:
                backoff_s = _BACKOFF_FIRST_S
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_LAST_S)

    async def _serve(self, client: WorkerClient) -> None:
        """Returns, or raises, when the worker is lost."""
        lost = asyncio.create_task(self._lost())
        attached = asyncio.create_task(self._attach(client))
        try:
            done, _ = await asyncio.wait((lost, attached), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            lost.cancel()
            attached.cancel()
            await asyncio.gather(lost, attached, return_exceptions=True)

    async def _attach(self, client: WorkerClient) -> None:
        info = self.info = await client.info(_INFO_TIMEOUT_S)
        if info.draining or self.retired:
            raise WorkerFaultError(f"the worker at {client.address} is going down")
        while self._owed:
            tenant, memory_uid = next(iter(self._owed))
            await client.evict(tenant, memory_uid, _EVICT_TIMEOUT_S)
            self._owed.discard((tenant, memory_uid))
        self._suspect.clear()
        self._client = client
        try:
            await self._announce(self, client, info)
            await self._probe(client, info)
        finally:
            self._client = None
            self._withdraw(self)

    async def _probe(self, client: WorkerClient, info: pb.GetInfoResponse) -> None:
        """Returns when the worker stopped answering or serves something else.

        One that drains gets no new work and is watched on: it still answers what it has.
        """
        failed = 0
        while failed < _PROBES_FAILED:
            with suppress(TimeoutError):
                async with asyncio.timeout(_PROBE_AGAIN_S if failed else _PROBE_EVERY_S):
                    await self._suspect.wait()
            self._suspect.clear()
            try:
                now = await client.info(_PROBE_TIMEOUT_S, wait_for_ready=False)
            except (ApiError, WorkerFaultError):
                failed += 1
                continue
            failed = 0
            self.info = now
            if now.draining:
                self._withdraw(self)
            if now.identity != info.identity or now.model_id != info.model_id:
                log.info("worker at %s now serves %s", client.address, now.model_id)
                return
        log.warning("worker at %s does not answer", client.address)

    def _owe(self, tenant: str, memory_uid: str) -> None:
        if len(self._owed) >= _MAX_OWED:
            self._owed = {(owed, "") for owed, _ in self._owed}
        self._owed.add((tenant, memory_uid))


class RemoteEndpoint(Endpoint):
    """A worker that somebody else runs."""

    def __init__(
        self,
        address: str,
        announce: Announce,
        withdraw: Withdraw,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """credentials: for an address on TCP; a unix socket is its user's own."""
        super().__init__(announce, withdraw)
        # It may hold what was deleted while nobody here could tell it.
        self._owe(*_EVERYTHING)
        self._address = address
        self._credentials = None if address.startswith("unix:") else credentials
        self._detach = asyncio.Event()

    @property
    def address(self) -> str:
        """As it was given."""
        return self._address

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[WorkerClient]:
        self._detach.clear()
        client = WorkerClient(self._address, credentials=self._credentials)
        try:
            yield client
        finally:
            await client.close()

    async def _lost(self) -> None:
        await self._detach.wait()
        log.warning("worker at %s failed to evict; attaching afresh", self._address)

    def _after_failed_evict(self, tenant: str, memory_uid: str) -> None:
        # It is withdrawn, and evicts before it is announced again.
        self._owe(tenant, memory_uid)
        self._detach.set()


class SupervisedEndpoint(Endpoint):
    """A worker that is our child."""

    def __init__(
        self, command: WorkerCommand, place: SocketPlace, announce: Announce, withdraw: Withdraw
    ) -> None:
        super().__init__(announce, withdraw)
        self._command = command
        self._place = place
        self._process: WorkerProcess | None = None

    @property
    def address(self) -> str:
        """Its socket."""
        return self._place.address

    @property
    def pid(self) -> int | None:
        """Process id of the running child."""
        return self._process.pid if self._process else None

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[WorkerClient]:
        process = await WorkerProcess.start(self._command, self._place)
        # A new process holds nothing.
        self._owed.clear()
        self._process = process
        client = WorkerClient(process.address)
        try:
            yield client
        finally:
            self._process = None
            await client.close()
            await process.stop()

    async def _lost(self) -> None:
        assert self._process is not None
        status = await self._process.wait()
        raise WorkerStartError(f"ended with status {status}")

    def _after_failed_evict(self, tenant: str, memory_uid: str) -> None:
        if self._process is not None:
            self._process.kill()
