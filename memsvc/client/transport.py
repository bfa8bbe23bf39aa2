"""One channel, and the three shapes of call with deadline, retries and typed errors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc

from memsvc.client.connection import Connection
from memsvc.client.errors import ApiError, from_rpc_error
from memsvc.client.retry import RetryPolicy

Request = TypeVar("Request")
Reply = TypeVar("Reply")

#: A reply of a list in the FULL view is the largest message a server sends.
_MAX_RECEIVE_BYTES = 128 << 20

_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", _MAX_RECEIVE_BYTES),
    # A server that comes back is found soon; the retry policy paces the calls.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)


def _channel(connection: Connection) -> grpc.aio.Channel:
    address, options = connection.address, _OPTIONS
    if "," in address or address.startswith("dns:"):
        # Of several servers one leads the tenant: the next try goes to the next one.
        options = (*options, ("grpc.lb_policy_name", "round_robin"))
    if connection.tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    tls = connection.tls
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )
    return grpc.aio.secure_channel(address, credentials, options=options)


class Deadline:
    """Time left of a call over all its attempts; None counts as endless."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Seconds left, not below 0."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())


class Transport:
    """A channel to one server, and the credential that every call carries."""

    def __init__(self, connection: Connection, policy: RetryPolicy) -> None:
        self._policy = policy
        self._metadata = (("authorization", f"Bearer {connection.api_key}"),)
        self.channel = _channel(connection)
        self._closed = False

    async def close(self) -> None:
        """Ends running calls with CallCancelledError."""
        self._closed = True
        await self.channel.close()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Request, Reply],
        request: Request,
        *,
        timeout_s: float | None,
        repeatable: bool,
    ) -> Reply:
        """One request, one reply. repeatable: repeating it does no harm."""

        async def attempt(remaining_s: float | None) -> Reply:
            return await method(request, timeout=remaining_s, metadata=self._metadata)

        return await self._retrying(attempt, timeout_s, repeatable)

    async def upload(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[Request, Reply],
        requests: Callable[[], AsyncIterator[Request]],
        *,
        timeout_s: float | None,
        repeatable: bool,
    ) -> Reply:
        """A stream of requests, one reply. `requests` starts the stream afresh."""

        async def attempt(remaining_s: float | None) -> Reply:
            source = _Recorded(requests())
            try:
                return await method(source, timeout=remaining_s, metadata=self._metadata)
            except asyncio.CancelledError:
                # gRPC cancels the call when the source of requests fails, and
                # drops why.
                if source.failure is not None:
                    raise source.failure from None
                raise

        return await self._retrying(attempt, timeout_s, repeatable)

    async def _retrying(
        self,
        attempt: Callable[[float | None], Awaitable[Reply]],
        timeout_s: float | None,
        repeatable: bool,
    ) -> Reply:
        deadline = Deadline(timeout_s)
        tries = 0
        while True:
            tries += 1
            try:
                return await attempt(deadline.remaining_s())
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
                await self._pause(tries, failure, deadline, repeatable)

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Request, Reply],
        request: Request,
        *,
        timeout_s: float | None,
        again: Callable[[], Request] | None = None,
    ) -> AsyncGenerator[Reply, None]:
        """One request, a stream of replies; leaving the iteration cancels the call.

        Tried again only until the first message came, unless `again` makes a request
        whose call tells all that the broken one would have told.
        """
        deadline = Deadline(timeout_s)
        tries = 0
        while True:
            tries += 1
            started = False
            if again is not None and tries > 1:
                request = again()
            call = method(request, timeout=deadline.remaining_s(), metadata=self._metadata)
            try:
                async for message in call:
                    started = True
                    yield message
                return
            except grpc.aio.AioRpcError as error:
                failure = from_rpc_error(error)
            finally:
                call.cancel()
            resume = again is not None
            if started and resume:
                tries = 1
            await self._pause(tries, failure, deadline, repeatable=resume or not started)

    async def _pause(
        self, tries: int, failure: ApiError, deadline: Deadline, repeatable: bool
    ) -> None:
        """Waits before the next attempt, or raises `failure` when there is none."""
        again = repeatable and not self._closed
        wait = self._policy.wait_s(tries, failure, deadline.remaining_s()) if again else None
        if wait is None:
            # gRPC's own exception says nothing that `failure` does not.
            raise failure from None
        await asyncio.sleep(wait)


class _Recorded(AsyncIterator[Request]):
    """An iterator that remembers what it raised."""

    def __init__(self, source: AsyncIterator[Request]) -> None:
        self._source = source
        self.failure: Exception | None = None

    async def __anext__(self) -> Request:
        try:
            return await anext(self._source)
        except StopAsyncIteration:
            raise
        except Exception as error:
            self.failure = error
            raise
