"""Typed calls to one model-adapter worker. Every failure is an ApiError or WorkerFaultError.

Cancelling the awaiting task, or leaving an iterator early, cancels the call, and
with it the worker's work at its next step.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import grpc
import numpy as np
from grpc import aio

from memsvc import errors
from memsvc.workers.failures import (
    CALL_FAILURES,
    RETRY_AFTER_S,
    WorkerFaultError,
    from_call_failure,
)
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceStub
from storage.layout import Bits, KVBlock, KVLayout

if TYPE_CHECKING:
    # In the stub file alone.
    from model_adapter.v1.model_adapter_pb2_grpc import ModelAdapterServiceAsyncStub

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

#: Largest message in either direction. A block of the longest document is the
#: largest thing sent; a worker keeps its replies below this.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

#: A batch takes seconds; a worker that is silent for this long hangs.
_ENCODE_TIMEOUT_S = 600.0
#: Several times what gRPC keeps of what a connection received last (8 KiB at first, more later).
_PADDING_BYTES = 128 * 1024

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A worker is never behind a proxy meant for the outside.
    ("grpc.enable_http_proxy", 0),
    # Otherwise channels to one address share a connection and its backoff state.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class DocumentText:
    """A document as the model reads it."""

    number: int
    text: str


@dataclass(frozen=True)
class EncodeFailure:
    """Why one document has no block. reason: an ErrorReason name."""

    number: int
    reason: str


class WorkerClient:
    """One channel to one worker. `model` names it in errors until `info` has told its id."""

    def __init__(
        self, address: str, model: str = "", credentials: grpc.ChannelCredentials | None = None
    ) -> None:
        self.address = address
        self.model = model
        if credentials is None:
            self._channel = aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        else:
            self._channel = aio.secure_channel(address, credentials, options=_CHANNEL_OPTIONS)
        self._stub: ModelAdapterServiceAsyncStub = ModelAdapterServiceStub(self._channel)

    async def close(self) -> None:
        """Ends the channel; calls in flight fail."""
        await self._channel.close()

    async def info(self, timeout_s: float, *, wait_for_ready: bool = True) -> pb.GetInfoResponse:
        """What the worker serves. wait_for_ready: waits for the connection up to timeout_s."""
        with self._failures():
            reply = await self._stub.GetInfo(
                pb.GetInfoRequest(), timeout=timeout_s, wait_for_ready=wait_for_ready
            )
        self.model = reply.model_id
        return reply

    async def encode(
        self,
        tenant: str,
        memory_uid: str,
        documents: Sequence[DocumentText],
        identity: str,
        layout: KVLayout,
    ) -> AsyncGenerator[KVBlock | EncodeFailure]:
        """One result per document, in any order, each block checked against the layout."""
        request = pb.EncodeRequest(
            tenant=tenant,
            memory_uid=memory_uid,
            identity=identity,
            documents=[pb.DocumentText(number=d.number, text=d.text) for d in documents],
        )
        wanted = {document.number for document in documents}
        with (
            self._failures(),
            _cancelled_in_the_end(self._stub.Encode(request, timeout=_ENCODE_TIMEOUT_S)) as call,
        ):
            async for reply in call:
                if reply.number not in wanted:
                    raise WorkerFaultError("the worker answered for a document not asked for")
                wanted.remove(reply.number)
                if reply.WhichOneof("result") == "failure":
                    yield EncodeFailure(reply.number, reply.failure.reason)
                else:
                    yield _block(reply.number, reply.block, layout)
        if wanted:
            raise WorkerFaultError(f"the worker left {len(wanted)} documents unanswered")

    async def route(self, request: pb.RouteRequest, timeout_s: float | None) -> pb.RouteResponse:
        """Ranks documents."""
        with self._failures():
            return await self._stub.Route(request, timeout=timeout_s)

    async def query(
        self, request: pb.QueryRequest, timeout_s: float | None
    ) -> AsyncGenerator[pb.QueryResponse]:
        """Events of one answer. A stream that ends without Finished raises WorkerFaultError."""
        finished = False
        with (
            self._failures(),
            _cancelled_in_the_end(self._stub.Query(request, timeout=timeout_s)) as call,
        ):
            async for event in call:
                finished = event.WhichOneof("event") == "finished"
                yield event
        if not finished:
            raise WorkerFaultError("the worker ended an answer without finishing it")

    async def evict(self, tenant: str, memory_uid: str, timeout_s: float) -> int:
        """Drops a memory, or with an empty uid a tenant, from the worker. Returns bytes freed."""
        with self._failures():
            request = pb.EvictRequest(
                tenant=tenant, memory_uid=memory_uid, padding=bytes(_PADDING_BYTES)
            )
            reply = await self._stub.Evict(request, timeout=timeout_s)
        return reply.freed_bytes

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Types what a call fails with."""
        try:
            yield
        except CALL_FAILURES as error:
            raise from_call_failure(error, self.model) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this task: its channel was closed under the call.
            raise errors.worker_unavailable(self.model, RETRY_AFTER_S) from error


@contextmanager
def _cancelled_in_the_end(
    call: aio.UnaryStreamCall[RequestT, ReplyT],
) -> Iterator[aio.UnaryStreamCall[RequestT, ReplyT]]:
    """A call that has ended is not harmed."""
    try:
        yield call
    finally:
        call.cancel()


def _block(number: int, wire: pb.Block, layout: KVLayout) -> KVBlock:
    shape = (len(layout.routed_layers), wire.chunks, layout.width)

    def array(data: bytes) -> Bits:
        if layout.dtype == "bf16":
            return np.frombuffer(data, dtype=np.dtype("<u2")).reshape(shape)
        return np.frombuffer(data, dtype=np.dtype("<f4")).reshape(shape)

    try:
        block = KVBlock(
            number=number,
            tokens=wire.tokens,
            routing_key_LCE=array(wire.routing_key),
            key_LCE=array(wire.key) if layout.separate_routing_keys else None,
            value_LCE=array(wire.value),
        )
        block.validate(layout)
    except ValueError as error:
        raise WorkerFaultError(f"the worker sent a block that does not fit: {error}") from error
    return block
