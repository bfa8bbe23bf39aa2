"""A worker tells memsvc that it is there, again and again, and in the end that it goes.

Only needed where memsvc does not know the worker's address by itself. What cannot be said now
is said later: the worker serves either way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from grpc import aio

from model_adapter.tls import TlsFiles
from model_adapter.v1 import registry_pb2 as pb
from model_adapter.v1.registry_pb2_grpc import WorkerRegistryServiceStub

if TYPE_CHECKING:
    # In the stub file alone.
    from model_adapter.v1.registry_pb2_grpc import WorkerRegistryServiceAsyncStub

log = logging.getLogger(__name__)

_CALL_S = 10.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True)
class Registration:
    """server: memsvc's address. address: the worker's own, as memsvc reaches it.

    api_key: the operator's. tls_roots: PEM certificates to trust; None: no TLS. tls: the
    worker's own files, for a memsvc that asks for a certificate.
    """

    server: str
    address: str
    api_key: str
    tls_roots: bytes | None = None
    tls: TlsFiles | None = None


@asynccontextmanager
async def registered(registration: Registration) -> AsyncIterator[None]:
    """Registered inside, as far as memsvc can be reached; leaving says so."""
    async with _channel(registration) as channel:
        stub: WorkerRegistryServiceAsyncStub = WorkerRegistryServiceStub(channel)
        heartbeat = asyncio.create_task(_heartbeat(stub, registration))
        try:
            yield
        finally:
            heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await heartbeat
            with suppress(aio.AioRpcError):
                await _register(stub, registration, leaving=True)


def _channel(registration: Registration) -> aio.Channel:
    if registration.tls_roots is None:
        return aio.insecure_channel(registration.server)
    own = registration.tls
    credentials = grpc.ssl_channel_credentials(
        registration.tls_roots,
        own.private_key.read_bytes() if own else None,
        own.certificate.read_bytes() if own else None,
    )
    return aio.secure_channel(registration.server, credentials)


async def _heartbeat(stub: WorkerRegistryServiceAsyncStub, registration: Registration) -> None:
    pause_s, known = _FIRST_PAUSE_S, False
    while True:
        try:
            reply = await _register(stub, registration)
        except aio.AioRpcError as error:
            log.warning("memsvc does not take this worker: %s", error.code().name)
            known = False
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)
            continue
        if not known:
            log.info("registered with memsvc")
        pause_s, known = _FIRST_PAUSE_S, True
        await asyncio.sleep(max(reply.heartbeat_s, _FIRST_PAUSE_S))


async def _register(
    stub: WorkerRegistryServiceAsyncStub, registration: Registration, *, leaving: bool = False
) -> pb.RegisterResponse:
    return await stub.Register(
        pb.RegisterRequest(address=registration.address, leaving=leaving),
        metadata=(("authorization", f"Bearer {registration.api_key}"),),
        timeout=_CALL_S,
    )
