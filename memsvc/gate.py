"""The gate every call passes: bounds, draining, who calls, parsing, and how it fails.

One interceptor does all of it in one order, so that no handler can forget a
step: count the call, refuse it when draining or overloaded, authenticate, check
the scope, parse the bytes, run the handler, map what it raises.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from grpc import aio
from grpc_status import rpc_status

from memsvc import errors
from memsvc.auth import OPEN_SERVICES, SCOPES, WHOLE_TENANT, Authenticator
from memsvc.errors import ApiError
from memsvc.open_calls import OpenCall
from memsvc.principal import Principal, set_principal
from memsvc.v1.errors_pb2 import ErrorReason
from memsvc.wire import METHODS, parse_request
from storage.catalog import CatalogFullError, CatalogUnavailableError, Scope
from storage.store import CorruptRecordError, StorageFullError, StoreUnavailableError

log = logging.getLogger(__name__)

# Requests and replies are messages of every kind here; handlers type their own.
# Both are generic for the type checker alone.
Context: TypeAlias = "aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


class Gate(aio.ServerInterceptor):
    """Guards all calls of one server.

    draining: once set, new calls are refused; those inside go on.
    max_calls: calls served at once.
    """

    def __init__(
        self, authenticator: Authenticator, draining: asyncio.Event, max_calls: int
    ) -> None:
        self._authenticator = authenticator
        self._draining = draining
        self._max_calls = max_calls
        self._calls = 0
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

        def parsed(requests: Any) -> Any:
            if handler.request_streaming:
                return _parse_stream(method, requests)
            return parse_request(method, requests)

        async def respond(requests: Any, context: Context) -> Any:
            async with self._inside(method, context):
                return await run(parsed(requests), context)

        async def respond_streaming(requests: Any, context: Context) -> AsyncIterator[Any]:
            # Closed at once when the caller leaves, and not when it is collected.
            async with (
                self._inside(method, context) as call,
                aclosing(run(parsed(requests), context)) as replies,
            ):
                async for reply in replies:
                    with call.away():
                        yield reply

        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(
            respond_streaming if handler.response_streaming else respond,
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    @asynccontextmanager
    async def _inside(self, method: str, context: Context) -> AsyncIterator[OpenCall]:
        self._calls += 1
        self._idle.clear()
        started = time.perf_counter()
        outcome = "LEFT"
        try:
            principal = await self._admit(method, context)
            set_principal(principal)
            with self._authenticator.calls.watch(principal, ends=_ends(method)) as call:
                yield call
            outcome = "OK"
        except aio.AbortError:
            raise
        except Exception as error:  # noqa: BLE001 - the edge: nothing may escape untyped
            refusal = _translated(method, error)
            outcome = ErrorReason.Name(refusal.reason)
            await context.abort_with_status(rpc_status.to_status(refusal.to_status()))
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()
            _log_call(method, outcome, time.perf_counter() - started)

    async def _admit(self, method: str, context: Context) -> Principal:
        if self._draining.is_set():
            raise errors.draining()
        if self._calls > self._max_calls:
            raise errors.overloaded()
        principal = await self._authenticator.authenticate(context.invocation_metadata())
        scope = SCOPES[method]
        if not principal.allows(scope):
            raise errors.scope_insufficient(scope.name)
        if principal.memories is not None and method in WHOLE_TENANT:
            raise errors.key_of_some_memories()
        return principal


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


async def _parse_stream(method: str, requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
    async for data in requests:
        yield parse_request(method, data)


def _translated(method: str, error: Exception) -> ApiError:
    """What a caller is told of what a handler raised."""
    extra = {"method": method}
    match error:
        case ApiError():
            return error
        case CatalogFullError() | StorageFullError():
            return errors.storage_full()
        case CatalogUnavailableError():
            log.error("catalog unavailable", exc_info=error, extra=extra)
            return errors.catalog_unavailable()
        case StoreUnavailableError():
            log.error("store unavailable", exc_info=error, extra=extra)
            return errors.store_unavailable()
        case CorruptRecordError():
            log.error("corrupt record", exc_info=error, extra=extra)
            return errors.record_corrupt("a stored record")
    incident = secrets.token_hex(8)
    log.error("internal fault", exc_info=error, extra={**extra, "incident": incident})
    return errors.internal_fault(incident)


def _log_call(method: str, outcome: str, seconds: float) -> None:
    """outcome: OK, an ErrorReason, or LEFT when the caller did."""
    if log.isEnabledFor(logging.DEBUG):
        extra = {"method": method, "outcome": outcome, "ms": round(seconds * 1000, 2)}
        log.debug("call", extra=extra)
