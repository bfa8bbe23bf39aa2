"""Which models are served, and by which worker."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass

import grpc

from memsvc import errors
from memsvc.config import Config
from memsvc.workers.client import WorkerClient
from memsvc.workers.endpoint import Endpoint, RemoteEndpoint, SupervisedEndpoint
from memsvc.workers.failures import RETRY_AFTER_S, WorkerFaultError
from memsvc.workers.placement import place
from memsvc.workers.registered import Registered
from memsvc.workers.supervisor import SocketPlace, WorkerCommand
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.catalog import Catalog, ModelRow, NotFoundError
from storage.layout import KVLayout, LayoutError
from storage.paths import DataFolder

log = logging.getLogger(__name__)

#: worker_address of a server whose workers all register themselves.
NO_WORKERS = "none"


@dataclass(frozen=True)
class Evicted:
    """Workers that dropped a memory, and workers that still have to."""

    wiped: int = 0
    owed: int = 0


@dataclass(frozen=True)
class ServedModel:
    """A model as one worker serves it now. replaces: it came with another identity than before."""

    row: ModelRow
    client: WorkerClient
    endpoint: Endpoint
    replaces: bool = False

    @property
    def address(self) -> str:
        """Where the worker is; no two workers share it."""
        return self.client.address


class Workers:
    """Registry of workers. With no worker_address set it supervises one child of its own.

    worker_address may name several workers, separated by commas; the first one's
    model is the default. Others register themselves. Workers of one model share its
    memories among them (`placement`); they must be of one identity.
    """

    def __init__(
        self,
        config: Config,
        catalog: Catalog,
        credentials: grpc.ChannelCredentials | None = None,
        data: DataFolder | None = None,
    ) -> None:
        """credentials: towards workers on TCP; None for no TLS. data: where a supervised
        worker's socket lies, if not right in the data folder.
        """
        self._data = data or config.folder
        self._credentials = credentials
        self._config = config
        self._catalog = catalog
        self._endpoints: list[Endpoint] = []
        self._registered = Registered(self._announce, self._withdraw, credentials=credentials)
        self._tasks: list[asyncio.Task[None]] = []
        self._served: dict[Endpoint, ServedModel] = {}
        self._replaced: set[str] = set()
        self._announcing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._generation = 0
        self._place: SocketPlace | None = None

    async def start(self) -> None:
        """Begins to attach workers; returns at once. Serving starts when they are ready."""
        named = self._config.worker_address
        addresses = [part.strip() for part in named.split(",")] if named != NO_WORKERS else []
        for address in filter(None, addresses):
            self._endpoints.append(
                RemoteEndpoint(address, self._announce, self._withdraw, self._credentials)
            )
        if not self._endpoints and named != NO_WORKERS:
            self._place = SocketPlace(self._data)
            command = WorkerCommand.from_config(self._config)
            self._endpoints.append(
                SupervisedEndpoint(command, self._place, self._announce, self._withdraw)
            )
        self._tasks = [asyncio.create_task(endpoint.run()) for endpoint in self._endpoints]
        self._tasks.append(asyncio.create_task(self._registered.watch()))

    async def close(self) -> None:
        """Stops supervised workers (SIGTERM, then SIGKILL) and leaves the others."""
        for task in self._tasks:
            task.cancel()
        for task in self._tasks:
            with suppress(asyncio.CancelledError):
                await task
        self._tasks.clear()
        await self._registered.close()
        if self._place is not None:
            self._place.clear()

    @property
    def endpoints(self) -> list[Endpoint]:
        """Of every worker that is there or should be."""
        return [*self._endpoints, *self._registered.endpoints]

    async def register(self, address: str) -> None:
        """A worker says that it is there, or still is. Raises TOO_MANY_ITEMS."""
        if all(endpoint.address != address for endpoint in self._endpoints):
            await self._registered.renew(address)

    def leave(self, address: str) -> None:
        """A worker says that it goes down."""
        self._registered.leave(address)
        for endpoint in self._endpoints:
            if endpoint.address == address:
                # It is awaited again: its address was configured.
                endpoint.suspect()

    @property
    def supervised_pid(self) -> int | None:
        """Process id of the supervised worker, None while there is none."""
        for endpoint in self._endpoints:
            if isinstance(endpoint, SupervisedEndpoint):
                return endpoint.pid
        return None

    def served(self) -> list[ServedModel]:
        """What every worker serves now."""
        return list(self._served.values())

    def of_model(self, model_id: str) -> list[ServedModel]:
        """The workers of a model."""
        return [served for served in self._served.values() if served.row.model_id == model_id]

    def find(self, model_id: str) -> ServedModel | None:
        """Any worker of a model, if one serves it now."""
        return next(iter(self.of_model(model_id)), None)

    def place(
        self, model_id: str, memory_uid: str, failed: Collection[Endpoint] = ()
    ) -> ServedModel | None:
        """The worker of a model that a memory belongs to now.

        failed: not these, unless there is no other.
        """
        workers = {served.address: served for served in self.of_model(model_id)}
        sound = {a: served for a, served in workers.items() if served.endpoint not in failed}
        address = place(memory_uid, (sound or workers).keys())
        return workers[address] if address is not None else None

    @property
    def generation(self) -> int:
        """Counts the changes of what is served."""
        return self._generation

    async def changed(self, seen: int) -> int:
        """Returns the generation as soon as it is another than the one seen."""
        while self._generation == seen:
            await self._changed.wait()
        return self._generation

    async def require(
        self, model_id: str, memory_uid: str, wait_s: float, failed: Collection[Endpoint] = ()
    ) -> ServedModel:
        """As place, awaited for up to wait_s. Raises WORKER_UNAVAILABLE."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while self.find(model_id) is None:
                    await self._changed.wait()
        served = self.place(model_id, memory_uid, failed)
        if served is None:
            raise errors.worker_unavailable(model_id, RETRY_AFTER_S)
        return served

    async def resolve(self, model_id: str, wait_s: float) -> ModelRow:
        """The model of that id, or the default one for an empty id. Raises MODEL_NOT_FOUND.

        With an empty id and no model known yet, the server has just been set up
        and its first worker is starting: that is awaited for up to wait_s, then
        WORKER_UNAVAILABLE is raised.
        """
        if not model_id:
            return await self._default(wait_s)
        served = self.find(model_id)
        if served is not None:
            return served.row
        try:
            return await self._catalog.get_model(model_id)
        except NotFoundError as error:
            raise errors.model_not_found() from error

    async def _default(self, wait_s: float) -> ModelRow:
        for served in self._served.values():
            if served.row.default:
                return served.row
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                seen = self._generation
                while (default := await self._catalog.default_model()) is None:
                    seen = await self.changed(seen)
                return default
        raise errors.worker_unavailable("", RETRY_AFTER_S)

    async def evict(self, tenant_uid: str, memory_uid: str) -> Evicted:
        """Drops a memory (with an empty uid: a tenant) from every worker, gone ones included."""
        said = await asyncio.gather(*(e.evict(tenant_uid, memory_uid) for e in self.endpoints))
        return Evicted(sum(said), len(said) - sum(said))

    async def _announce(
        self, endpoint: Endpoint, client: WorkerClient, info: pb.GetInfoResponse
    ) -> None:
        async with self._announcing:
            row = self._row(info, default=await self._is_default(endpoint, info.model_id))
            self._refuse_another_identity(row)
            if await self._replaces(row):
                self._replaced.add(row.model_id)
            await self._catalog.upsert_model(row)
            replaces = row.model_id in self._replaced
            self._served[endpoint] = ServedModel(row, client, endpoint, replaces)
        log.info(
            "model %s (%s) is served from %s, on %s in %s",
            row.model_id,
            row.identity[:12],
            client.address,
            info.device,
            info.compute_dtype,
        )
        self._notify()

    def _refuse_another_identity(self, row: ModelRow) -> None:
        """Else the model's blocks would be made and unmade in turns."""
        holder = self.find(row.model_id)
        if holder is not None and holder.row.identity != row.identity:
            raise WorkerFaultError(
                f"{holder.address} serves {row.model_id} with another identity; "
                "all its workers must be of one"
            )

    async def _replaces(self, row: ModelRow) -> bool:
        try:
            return (await self._catalog.get_model(row.model_id)).identity != row.identity
        except NotFoundError:
            return False

    def _withdraw(self, endpoint: Endpoint) -> None:
        if self._served.pop(endpoint, None) is not None:
            self._notify()

    async def _is_default(self, endpoint: Endpoint, model_id: str) -> bool:
        """The first configured worker's model is, or without one the first that registers."""
        first = self._endpoints[0] if self._endpoints else None
        if endpoint is first:
            return True
        default = await self._catalog.default_model()
        if default is None:
            return first is None
        return default.model_id == model_id

    def _row(self, info: pb.GetInfoResponse, *, default: bool) -> ModelRow:
        try:
            layout = KVLayout.of(info.layout)
        except LayoutError as error:
            raise WorkerFaultError(str(error)) from error
        return ModelRow(
            model_id=info.model_id,
            display_name=info.display_name,
            identity=info.identity,
            layout=layout,
            max_document_tokens=info.max_document_tokens,
            max_question_tokens=info.max_question_tokens,
            max_answer_tokens=info.max_answer_tokens,
            default=default,
            last_seen_us=time.time_ns() // 1000,
        )

    def _notify(self) -> None:
        """Wakes every waiter of `changed` once."""
        self._generation += 1
        self._changed.set()
        self._changed = asyncio.Event()
