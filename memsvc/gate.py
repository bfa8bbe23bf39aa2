"""The gate every call passes: bounds, draining, who calls, parsing, and how it fails.

One interceptor does all of it in one order, so that no handler can forget a
step: count the call, refuse it when draining or overloaded, authenticate, check
the scope and the tenant's limits, parse the bytes, run the handler, map what it
raises. Streams are bounded in time here, too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc
from grpc import aio
from grpc_status import rpc_status

from memsvc import errors
from memsvc.api_error import ApiError
from memsvc.audit import AUDITED, AuditTrail
from memsvc.auth import OPEN_SERVICES, SCOPES, WHOLE_TENANT, Authenticator
from memsvc.deletion import DeletionUnfinishedError
from memsvc.leases import Leading
from memsvc.limits import Admission, Limiter, Refusals
from memsvc.limits.attempts import address
from memsvc.limits.streams import received, within
from memsvc.open_calls import OpenCall
from memsvc.principal import Principal, set_principal
from memsvc.v1 import memory_service_pb2
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.wire import METHODS, parse_request
from storage.catalog import CatalogFullError, CatalogUnavailableError, LeaseLostError, Scope
from storage.store import (
    CorruptRecordError,
    KeyMissingError,
    StorageFullError,
    StoreUnavailableError,
    TenantRemovedError,
)

log = logging.getLogger(__name__)

#: How long a failed call's status may wait for a client that does not read.
_ABORT_S = 2.0
#: Its calls are about the data of the caller's tenant.
_DATA_SERVICE = memory_service_pb2.DESCRIPTOR.services_by_name["MemoryService"].full_name

#: Refusals of those who send too much, which some heed and some do not.
_TOO_MUCH = frozenset(
    {
        ErrorReason.OVERLOADED,
        ErrorReason.QUOTA_EXCEEDED,
        ErrorReason.ENCODING_BACKLOG_FULL,
        ErrorReason.CREDENTIAL_ATTEMPTS,
    }
)

# Requests and replies are messages of every kind here; handlers type their own.
# Both are generic for the type checker alone.
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


Observe: TypeAlias = Callable[[str, str, float, str], None]


class Gate(aio.ServerInterceptor):
    """Guards all calls of one server.

    draining: once set, new calls are refused; those inside go on.
    limiter: which calls are let in. leases: whose data is served here.
    require_room: by a call's path, what raises OVERLOADED for a tenant that has no room for one
    more of it: such a call is no act yet, and costs no entry of the audit trail.
    max_calls: calls that are being authenticated at once.
    idle_s: how long a stream's client may do nothing.
    observe: told of every call that ended: its path, outcome, seconds and tenant id.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        audit: AuditTrail,
        draining: asyncio.Event,
        limiter: Limiter,
        leases: Leading,
        *,
        require_room: Mapping[str, Callable[[str], None]],
        max_calls: int,
        idle_s: float,
        observe: Observe | None = None,
    ) -> None:
        self._authenticator = authenticator
        self._audit = audit
        self._draining = draining
        self._limiter = limiter
        self._leases = leases
        self._require_room = require_room
        self._max_calls = max_calls
        self._idle_s = idle_s
        self._observe = observe
        self._refusals = Refusals()
        self._calls = 0
        self._authenticating = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """Calls inside now."""
        return self._calls

    async def wait_idle(self) -> None:
        """Returns when no call is inside."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps the handler of a call of the public API."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        # None: no such method, which gRPC answers with UNIMPLEMENTED.
        if handler is None or method.split("/")[1] in OPEN_SERVICES:
            return handler
        return self._guarded(method, handler)

    def _guarded(self, method: str, handler: Handler) -> Handler:
        """The same handler behind the gate, taking raw bytes."""
        run: Any = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )
        if method in AUDITED:
            audited = self._audit.streaming if handler.response_streaming else self._audit.unary
            run = audited(method, run)

        def parsed(requests: Any, admission: Admission) -> Any:
            if handler.request_streaming:
                return self._parse_stream(method, requests, admission)
            admission.spend_bytes(len(requests))
            return parse_request(method, requests)

        async def respond(requests: Any, context: Context) -> Any:
            async with self._inside(method, context) as (admission, call):
                limit = admission.stream_seconds if handler.request_streaming else 0
                async with within(limit, "stream_seconds"), admission.turn():
                    call.require_live()
                    reply = await run(parsed(requests, admission), context)
                _count(admission, reply)
                return reply

        async def respond_streaming(requests: Any, context: Context) -> None:
            # Closed at once when the caller leaves, and not when it is collected.
            async with (
                self._inside(method, context) as (admission, _),
                within(admission.stream_seconds, "stream_seconds"),
                admission.turn(),
                aclosing(run(parsed(requests, admission), context)) as replies,
            ):
                async for reply in replies:
                    await self._send(context, reply, admission)

        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(
            respond_streaming if handler.response_streaming else respond,
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    async def _parse_stream(
        self, method: str, requests: AsyncIterator[bytes], admission: Admission
    ) -> AsyncIterator[Any]:
        async for data in received(requests, self._idle_s):
            admission.spend_bytes(len(data))
            yield parse_request(method, data)
            await admission.pace()

    async def _send(self, context: Context, reply: Any, admission: Admission) -> None:
        """Returns when there is room for the next one: the client reads, or fast enough."""
        _count(admission, reply)
        async with within(self._idle_s, "stream_idle_s"):
            await context.write(reply)
        await admission.pace()

    @asynccontextmanager
    async def _inside(
        self, method: str, context: Context
    ) -> AsyncIterator[tuple[Admission, OpenCall]]:
        self._calls += 1
        self._idle.clear()
        started = time.perf_counter()
        outcome, tenant_id = "LEFT", ""
        try:
            principal = await self._admit(method, context)
            tenant_id = principal.tenant_id
            set_principal(principal)
            with self._authenticator.calls.watch(principal, ends=_ends(method)) as call:
                async with self._limiter.enter(principal.tenant_uid, method) as admission:
                    if method in self._require_room:
                        self._require_room[method](principal.tenant_uid)
                    yield admission, call
            outcome = "OK"
        except aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: nothing may escape untyped
            refusal = _translated(method, error)
            outcome = ErrorReason.Name(refusal.reason)
            if refusal.reason in _TOO_MUCH and not self._draining.is_set():
                await self._refusals.hold(tenant_id or address(context.peer()))
            await _abort(context, refusal)
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
            seconds = time.perf_counter() - started
            _log_call(method, outcome, seconds)
            if self._observe is not None:
                self._observe(method, outcome, seconds, tenant_id)

    async def _admit(self, method: str, context: Context) -> Principal:
        if self._draining.is_set():
            raise errors.draining()
        if self._authenticating >= self._max_calls:
            raise errors.overloaded()
        self._authenticating += 1
        try:
            principal = await self._authenticator.authenticate(
                context.invocation_metadata(), context.peer()
            )
        finally:
            self._authenticating -= 1
        refusal = _out_of_scope(method, principal)
        if refusal is not None:
            await self._audit.refused(method, principal)
            raise refusal
        if method.split("/")[1] == _DATA_SERVICE:
            await self._leases.require(principal.tenant_uid)
        return principal


def _out_of_scope(method: str, principal: Principal) -> ApiError | None:
    """What a caller is told whose key does not do for a call."""
    scope = SCOPES[method]
    if not principal.allows(scope):
        return errors.scope_insufficient(scope.name)
    if principal.memories is not None and method in WHOLE_TENANT:
        return errors.key_of_some_memories()
    return None


def _ends(method: str) -> bool:
    """Whether a call in flight ends with its credential: every one but a unary write,
    whose caller could not tell a refusal from one that came too late."""
    shape = METHODS[method]
    streams = shape.client_streaming or shape.server_streaming
    return streams or SCOPES[method] is Scope.READ


_MAKERS: dict[tuple[bool, bool], Callable[..., Handler]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _count(admission: Admission, reply: Any) -> None:
    if admission.counts_bytes:
        admission.spend_bytes(reply.ByteSize())


async def _abort(context: Context, refusal: ApiError) -> None:
    """Ends the call with a status.

    A client that does not read holds up its own status, which gRPC keeps for it;
    this task and its place are not kept.
    """
    try:
        async with asyncio.timeout(_ABORT_S) as bound:
            await context.abort_with_status(rpc_status.to_status(refusal.to_status()))
    except TimeoutError:
        if not bound.expired():
            raise
        raise asyncio.CancelledError from None


#: What a handler may raise, what the log says of it (empty: nothing) and how loudly, and what
#: the caller is told. The first that fits.
_TOLD: tuple[tuple[type[Exception], int, str, Callable[[], ApiError]], ...] = (
    (DeletionUnfinishedError, logging.ERROR, "deletion unfinished", errors.deletion_unfinished),
    (CatalogFullError, 0, "", errors.storage_full),
    (StorageFullError, 0, "", errors.storage_full),
    (LeaseLostError, logging.WARNING, "tenant lost to another server", errors.served_elsewhere),
    (CatalogUnavailableError, logging.ERROR, "catalog unavailable", errors.catalog_unavailable),
    (StoreUnavailableError, logging.ERROR, "store unavailable", errors.store_unavailable),
    # Whose tenant was deleted under the call has no credential any more.
    (TenantRemovedError, logging.WARNING, "tenant removed", errors.credential_invalid),
    # Who deleted the memory under the call destroyed it.
    (KeyMissingError, logging.WARNING, "key missing", errors.memory_not_found),
    (
        CorruptRecordError,
        logging.ERROR,
        "corrupt record",
        partial(errors.record_corrupt, "a stored record"),
    ),
)


def _translated(method: str, error: Exception) -> ApiError:
    """What a caller is told of what a handler raised."""
    if isinstance(error, ApiError):
        return error
    extra = {"method": method}
    for kind, level, logged, told in _TOLD:
        if isinstance(error, kind):
            if logged:
                log.log(level, logged, exc_info=error, extra=extra)
            return told()
    incident = secrets.token_hex(8)
    log.error("internal fault", exc_info=error, extra={**extra, "incident": incident})
    return errors.internal_fault(incident)


def _log_call(method: str, outcome: str, seconds: float) -> None:
    """outcome: OK, an ErrorReason, or LEFT when the caller did."""
    if log.isEnabledFor(logging.DEBUG):
        extra = {"method": method, "outcome": outcome, "ms": round(seconds * 1000, 2)}
        log.debug("call", extra=extra)
