"""Stands before a worker, passes every call on, and counts the documents that it encodes.

What a worker says of itself ends with its process, and what the server counts is what it
has kept. What goes over the wire is what was computed.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc import aio
from grpc_status import rpc_status

from model_adapter.v1 import model_adapter_pb2 as pb

_ENCODE = "/Encode"
_ANY_SIZE = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A worker that is started again is found at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
)


@dataclass(frozen=True)
class Encoded:
    """One document that came back from the worker. at: time.monotonic()."""

    number: int
    at: float


class CountingProxy(grpc.GenericRpcHandler):
    """Between a server and one worker. encoded: everything that the worker has encoded."""

    def __init__(self, listen: str, worker: str) -> None:
        """Addresses as gRPC takes them."""
        self.encoded: list[Encoded] = []
        self._worker = aio.insecure_channel(worker, options=_ANY_SIZE)
        self._server = aio.server(options=_ANY_SIZE)
        self._server.add_generic_rpc_handlers((self,))
        self._server.add_insecure_port(listen)

    async def start(self) -> None:
        """Begins to pass calls on."""
        await self._server.start()

    async def stop(self) -> None:
        """Ends every call."""
        await self._server.stop(None)
        await self._worker.close()

    def service(self, handler_call_details: Any) -> Any:
        """See grpc.GenericRpcHandler. On the wire all kinds of call are streams."""
        method: str = handler_call_details.method

        async def passed(
            requests: AsyncIterator[bytes], context: aio.ServicerContext[bytes, bytes]
        ) -> AsyncIterator[bytes]:
            forward: aio.StreamStreamMultiCallable[bytes, bytes]
            forward = self._worker.stream_stream(method)
            call = forward(requests, timeout=context.time_remaining(), wait_for_ready=False)
            try:
                async for reply in call:
                    if method.endswith(_ENCODE):
                        self._count(reply)
                    yield reply
            except aio.AioRpcError as error:
                status = rpc_status.from_call(error)
                if status is not None:
                    await context.abort_with_status(rpc_status.to_status(status))
                await context.abort(error.code(), error.details() or "")
            finally:
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(passed)

    def _count(self, reply: bytes) -> None:
        message = pb.EncodeResponse.FromString(reply)
        if message.HasField("block"):
            self.encoded.append(Encoded(message.number, time.monotonic()))
