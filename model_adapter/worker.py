"""One worker: engine, scheduler, pager and gRPC server, from start to drained end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from model_adapter.engine import Engine
from model_adapter.fetching import Fetcher
from model_adapter.keys import HeldKeys
from model_adapter.limits import Limits
from model_adapter.pager import Budgets, Pager
from model_adapter.readers import Readers
from model_adapter.scheduler import Scheduler
from model_adapter.service import ModelAdapter
from model_adapter.tls import TlsFiles
from model_adapter.v1.model_adapter_pb2_grpc import add_ModelAdapterServiceServicer_to_server
from model_adapter.wire import MAX_MESSAGE_BYTES
from storage.lmdb_store import LmdbReader
from storage.paths import DataFolder
from storage.store import EncodingId

#: Above what the scheduler admits, so that its typed refusal is the one that is seen.
_MAX_CALLS = 512

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Two workers on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
)


class ListenError(Exception):
    """The address can't be listened on."""


@dataclass(frozen=True)
class WorkerConfig:
    """listen: "unix:PATH" or "host:port", port 0 for a free one. drain_grace_s: for queries.

    tls: for host:port; a unix socket is for its own user alone.
    """

    listen: str
    data: DataFolder
    budgets: Budgets
    drain_grace_s: float = 10.0
    limits: Limits = field(default_factory=Limits)
    tls: TlsFiles | None = None


@asynccontextmanager
async def serving(
    engine: Engine, device: torch.device, config: WorkerConfig, on_fault: Callable[[], None]
) -> AsyncIterator[str]:
    """Serves inside; yields the address. Leaving drains. Raises ListenError.

    on_fault: called from another thread when the worker can't go on.
    """
    description = engine.description
    keys = HeldKeys()
    readers = Readers(lambda tenant: LmdbReader(config.data.tenant(tenant), keys.tenant(tenant)))
    encoding = EncodingId(bytes.fromhex(description.identity)[:16])
    pager = Pager(
        description.layout,
        encoding,
        readers,
        config.budgets,
        device,
        keys,
        storing=description.storing,
        fetcher=Fetcher.of(device, description.layout),
    )
    scheduler = Scheduler(engine, config.limits, on_fault=on_fault)
    service = ModelAdapter(description, scheduler, pager, config.budgets)
    server = aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
    add_ModelAdapterServiceServicer_to_server(service, server)
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    address = _bind(server, config.listen, config.tls)
    scheduler.start()
    await server.start()
    await servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    try:
        yield address
    finally:
        await servicer.enter_graceful_shutdown()
        await asyncio.to_thread(scheduler.drain, config.drain_grace_s)
        # Every stream has its end by now; the second is for the last bytes.
        await server.stop(1.0)
        await asyncio.to_thread(service.close)
        readers.close()


def _bind(server: aio.Server, listen: str, tls: TlsFiles | None) -> str:
    """Listens; a unix socket is for this user alone. Returns the address to connect to."""
    scheme, _, rest = listen.partition(":")
    if scheme == "unix":
        Path(rest).parent.mkdir(parents=True, exist_ok=True)
    mask = os.umask(0o177)
    try:
        if tls is None or scheme == "unix":
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, tls.credentials())
    except (OSError, RuntimeError) as error:
        raise ListenError(f"can't listen on {listen}: {error}") from error
    finally:
        os.umask(mask)
    return listen if scheme == "unix" else f"{listen.rpartition(':')[0]}:{port}"
