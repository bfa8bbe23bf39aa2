"""The server process: built, run, drained, closed.

hold the data folder -> open the catalog -> lead tenants, reconciled -> start workers and
the encoding queue -> serve -> (SIGTERM) drain -> close in the opposite order
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from memsvc.api.archive import EXPORT
from memsvc.api.service import AdminService, MemoryService, RegistryService
from memsvc.application import Application
from memsvc.audit import AuditTrail
from memsvc.auth import Authenticator, load_server_key
from memsvc.config import Config
from memsvc.deletion import Deletions
from memsvc.encoding import EncodingQueue
from memsvc.fields import Fields
from memsvc.gate import Gate
from memsvc.housekeeping import keep_house
from memsvc.keys import Keys, load_root_keys
from memsvc.leases import Leading, Leases, SoleServer
from memsvc.limits import Attempts, Limiter
from memsvc.metrics import Metrics
from memsvc.paging import PageTokens
from memsvc.places import Place, take_place
from memsvc.progress import Progress
from memsvc.receipts import SEED_PURPOSE, Receipts
from memsvc.reconcile import reconcile, reconcile_tenant
from memsvc.setup import Initialised, hold, initialise, make_folders
from memsvc.staging import Staging
from memsvc.stores import Stores, lmdb_opener
from memsvc.tls import server_credentials, worker_credentials
from memsvc.token_auth import TokenAuthenticator
from memsvc.tokens import KeySetError, TokenVerifier
from memsvc.transport import grpc_options
from memsvc.v1 import admin_service_pb2, memory_service_pb2
from memsvc.v1 import admin_service_pb2_grpc as admin_grpc
from memsvc.v1 import memory_service_pb2_grpc as memory_grpc
from memsvc.workers import Evicted, Workers
from memsvc.writes import Writes
from model_adapter.v1 import registry_pb2, registry_pb2_grpc
from storage.catalog import (
    Catalog,
    CatalogError,
    MemoryRow,
    TenantRow,
    is_shared,
)

__all__ = ["Initialised", "Server", "ServerStartError", "initialise", "open_server", "run"]

log = logging.getLogger(__name__)

SERVICES = tuple(
    service.full_name
    for module in (memory_service_pb2, admin_service_pb2, registry_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
)

#: Calls that are still inside when the grace has passed are cancelled; this is
#: how long they get to notice.
_CANCEL_S = 2.0
#: When garbage is collected. All of it is looked through a tenth as often as by default: that takes
#: 10 to 15 ms of a busy server, in which everybody waits, and most garbage is found before.
_GARBAGE = (700, 5, 200)
#: How long a thread may keep the interpreter while others want it: a call waits so long for it
#: several times, and every hand-over costs who is half done (docs/performance, overload).
_SWITCH_S = 0.002


class ServerStartError(Exception):
    """The server cannot start; the message says what to do."""


class Server:
    """A serving process. Made by `open_server`."""

    def __init__(self, application: Application, server: aio.Server, gate: Gate) -> None:
        self.application = application
        self.address = ""
        self.metrics_port = 0
        self._hurry = asyncio.Event()
        self._server = server
        self._gate = gate
        self._health = health_aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)

    async def start(self) -> None:
        """Begins to serve. Raises ServerStartError when the address is taken."""
        self.address = _bind(self._server, self.application.config)
        await self._server.start()
        for service in ("", *SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        log.info("serving", extra={"address": self.address})

    @property
    def calls(self) -> int:
        """Calls inside now."""
        return self._gate.calls

    def hurry(self) -> None:
        """Ends the grace of a drain at once."""
        self._hurry.set()

    async def drain(self, grace_s: float) -> None:
        """Refuses new calls with DRAINING, lets those inside finish for grace_s, then stops."""
        log.info("draining", extra={"calls": self._gate.calls})
        self.application.draining.set()
        await self._health.enter_graceful_shutdown()
        idle = asyncio.create_task(self._gate.wait_idle())
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({idle, hurried}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        # A call that arrives now is being refused: without a moment's grace it would be
        # answered CANCELLED, with no reason, instead of DRAINING.
        await self._server.stop(_CANCEL_S if idle.done() else 0)
        await asyncio.wait({idle}, timeout=_CANCEL_S)
        for task in (idle, hurried):
            task.cancel()
        await self.application.writes.drain()
        log.info("drained", extra={"calls": self._gate.calls})


@asynccontextmanager
async def open_application(config: Config) -> AsyncIterator[Application]:
    """The parts over a data folder that no server holds: nothing is served, no worker runs.

    Raises DataFolderError, ServerKeyError, ServerStartError.
    """
    async with AsyncExitStack() as stack:
        stack.enter_context(hold(config.folder))
        make_folders(config.folder)
        yield await _build(config, stack)


@asynccontextmanager
async def open_server(config: Config) -> AsyncIterator[Server]:
    """A server, serving inside the with block and drained at its end.

    Raises DataFolderError, ServerKeyError, RootKeyError, ServerStartError.
    """
    async with AsyncExitStack() as stack:
        place = _take_hold(config, stack)
        application = await _build(config, stack, place)
        await _lead(application, stack)
        await application.workers.start()
        stack.push_async_callback(application.workers.close)
        await application.encoding.start()
        stack.push_async_callback(application.encoding.drain)
        housekeeping = asyncio.create_task(keep_house(application))
        stack.callback(housekeeping.cancel)
        metrics = Metrics(by_tenant=config.metrics_tenants) if config.metrics_listen else None
        server = _make_server(application, metrics)
        if metrics is not None:
            metrics.watch(lambda: (server.calls, application.encoding.waiting()))
            server.metrics_port = stack.enter_context(_serve_metrics(metrics, config))
        await server.start()
        try:
            yield server
        finally:
            await server.drain(config.drain_grace_s)


def _take_hold(config: Config, stack: AsyncExitStack) -> Place | None:
    """The data folder as this server alone uses it; its own place in it, where it shares the
    catalog with others. Raises DataFolderError, ServerStartError.
    """
    try:
        shared = is_shared(config.catalog_url)
    except CatalogError as error:
        raise ServerStartError(str(error)) from error
    stack.enter_context(hold(config.folder, shared=shared))
    make_folders(config.folder)
    if not shared:
        return None
    place = stack.enter_context(take_place(config.folder.root))
    make_folders(place.data)
    return place


async def _lead(application: Application, stack: AsyncExitStack) -> None:
    """Reconciles what this server leads, before anything is served or encoded."""
    leases = application.leases
    if not isinstance(leases, Leases):
        await reconcile(application)
        return

    async def take_over(tenant: TenantRow) -> None:
        application.limiter.forget(tenant.uid)
        await reconcile_tenant(application, tenant)
        # A worker that both servers use may hold what the other one did not live to purge.
        await application.workers.evict(tenant.uid, "")
        application.encoding.wake()

    async def lost(tenant_uid: str) -> None:
        application.deletions.owed.forget(tenant_uid)
        await application.workers.evict(tenant_uid, "")

    stack.push_async_callback(leases.stop)
    try:
        await leases.start(take_over, lost)
    except CatalogError as error:
        raise ServerStartError(str(error)) from error


async def _build(config: Config, stack: AsyncExitStack, place: Place | None = None) -> Application:
    """The parts, in the order they need each other."""
    server_key = load_server_key(config.folder.server_key)
    try:
        verifier = TokenVerifier(config) if config.jwt_issuer else None
        towards_workers = worker_credentials(config)
    except (KeySetError, OSError) as error:
        raise ServerStartError(str(error)) from error
    keys = Keys(config.folder, load_root_keys(config))
    try:
        catalog = await Catalog.open(config.catalog_url)
    except CatalogError as error:
        raise ServerStartError(str(error)) from error
    stack.push_async_callback(catalog.close)
    leases: Leading = SoleServer()
    if place is not None:
        leases = Leases(catalog, place, config.lease_s)
        stack.push_async_callback(leases.close)
    tokens = TokenAuthenticator(catalog, verifier) if verifier is not None else None
    stores = Stores(
        config.folder,
        config.open_environments,
        config.reader_threads,
        lmdb_opener(config.max_store_bytes, keys),
    )
    stack.push_async_callback(stores.close)
    progress = Progress()
    data = place.data if place is not None else config.folder
    workers = Workers(config, catalog, towards_workers, data)
    limiter = Limiter(config, catalog.quotas)
    encoding = EncodingQueue(config, catalog, stores, progress, workers, limiter=limiter)

    def notify(memory: MemoryRow, appended: bool) -> None:
        progress.publish(memory.uid, appended=appended)
        encoding.wake()

    receipts = Receipts(config.folder, server_key.derive(SEED_PURPOSE))
    receipts.publish()
    staging = Staging(data, config.transfer_keep_s)

    async def evict(tenant_uid: str, memory_uid: str) -> Evicted:
        staging.forget(tenant_uid, memory_uid)
        return await workers.evict(tenant_uid, memory_uid)

    deletions = Deletions(catalog, stores, keys, receipts, evict)
    return Application(
        config=config,
        data=data,
        keys=keys,
        fields=Fields(keys),
        catalog=catalog,
        stores=stores,
        writes=Writes(catalog, stores, notify, deletions, limiter),
        deletions=deletions,
        receipts=receipts,
        staging=staging,
        progress=progress,
        encoding=encoding,
        workers=workers,
        limiter=limiter,
        leases=leases,
        authenticator=Authenticator(
            catalog,
            server_key,
            tokens,
            attempts=Attempts(config.failed_credentials_per_minute),
            leads=leases.leads,
        ),
        audit=AuditTrail(catalog, server_key),
        page_tokens=PageTokens(server_key.derive("page tokens")),
    )


@contextmanager
def _serve_metrics(metrics: Metrics, config: Config) -> Iterator[int]:
    with ExitStack() as stack:
        try:
            port = stack.enter_context(metrics.served(config.metrics_listen))
        except (OSError, ValueError) as error:
            raise ServerStartError(f"no metrics on {config.metrics_listen}: {error}") from error
        yield port


def _make_server(application: Application, metrics: Metrics | None) -> Server:
    config = application.config
    gate = Gate(
        application.authenticator,
        application.audit,
        application.draining,
        application.limiter,
        application.leases,
        require_room={EXPORT: application.staging.require_room},
        max_calls=config.max_concurrent_calls,
        idle_s=config.stream_idle_s,
        observe=metrics.call if metrics is not None else None,
    )
    server = aio.server(
        interceptors=[gate],
        # The gate refuses in words; this bounds what waits to be refused.
        maximum_concurrent_rpcs=4 * config.max_concurrent_calls,
        options=grpc_options(config),
    )
    memory_grpc.add_MemoryServiceServicer_to_server(MemoryService(application), server)
    admin_grpc.add_AdminServiceServicer_to_server(AdminService(application), server)
    registry_pb2_grpc.add_WorkerRegistryServiceServicer_to_server(
        RegistryService(application), server
    )
    if config.reflection:
        names = (*SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    return Server(application, server, gate)


def _bind(server: aio.Server, config: Config) -> str:
    """Returns the address with the port that was chosen for port 0."""
    try:
        credentials = server_credentials(config)
        if credentials is not None:
            port = server.add_secure_port(config.listen, credentials)
        else:
            port = server.add_insecure_port(config.listen)
    except (OSError, RuntimeError) as error:
        raise ServerStartError(f"cannot serve on {config.listen}: {error}") from error
    host, separator, given = config.listen.rpartition(":")
    return f"{host}:{port}" if separator and given == "0" else config.listen


async def run(config: Config, on_serving: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT, then drains. A second signal ends the grace.

    on_serving: told the address once calls are taken.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    serving: list[Server] = []

    def signalled() -> None:
        if stop.is_set():
            for server in serving:
                server.hurry()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    async with open_server(config) as server:
        # What is there from the start stays: collecting garbage need not look through it again
        # and again, with everybody waiting.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GARBAGE)
        sys.setswitchinterval(_SWITCH_S)
        serving.append(server)
        on_serving(server.address)
        await stop.wait()
