"""A memory service that does what a test tells it: fails first, breaks streams, is slow.

The behaviour of the real server is tested in tests/client/test_live.py; this one
produces on demand what a sound server rarely does.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from memsvc.v1 import memory_service_pb2 as service
from memsvc.v1 import memory_service_pb2_grpc as rpc
from memsvc.v1 import resources_pb2 as wire


@dataclass
class Failure:
    """A failure to answer with; reason empty leaves the details out."""

    code: str
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_after_s: float | None = None

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if not self.reason:
            await context.abort(grpc.StatusCode[self.code], "scripted")
        status = status_pb2.Status(code=code_pb2.Code.Value(self.code), message="scripted")
        info = error_details_pb2.ErrorInfo(
            domain="memsvc", reason=self.reason, metadata=self.metadata
        )
        status.details.add().Pack(info)
        if self.retry_after_s is not None:
            delay = Duration()
            delay.FromNanoseconds(int(self.retry_after_s * 1e9))
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        await context.abort_with_status(rpc_status.to_status(status))


@dataclass
class Script:
    """What happened, and what shall happen."""

    failures: list[Failure] = field(default_factory=list)
    requests: list[Message] = field(default_factory=list)
    #: Of imports, and what the last one brought.
    headers: list[Any] = field(default_factory=list)
    received: list[bytes] = field(default_factory=list)
    #: Whether what a cut import brought is kept.
    keeps: bool = False
    metadata: list[dict[str, Any]] = field(default_factory=list)
    #: Messages of a stream; a Failure among them ends it.
    messages: list[Message | Failure] = field(default_factory=list)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    hang: bool = False

    async def enter(self, request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.requests.append(request)
        self.entered.set()
        self.metadata.append(dict(context.invocation_metadata() or ()))
        if self.failures:
            await self.failures.pop(0).abort(context)

    async def stream(self, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            for message in self.messages:
                if isinstance(message, Failure):
                    self.messages = self.messages[self.messages.index(message) + 1 :]
                    await message.abort(context)
                yield message
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class _Service(rpc.MemoryServiceServicer):
    def __init__(self, script: Script) -> None:
        self._script = script

    async def GetMemory(self, request: Any, context: Any) -> wire.Memory:
        await self._script.enter(request, context)
        if self._script.hang:
            await asyncio.sleep(30)
        return wire.Memory(name=request.name, state=wire.Memory.ACTIVE)

    async def UpdateMemory(self, request: Any, context: Any) -> wire.Memory:
        await self._script.enter(request, context)
        return wire.Memory(name=request.memory.name)

    async def DeleteMemory(self, request: Any, context: Any) -> Any:
        await self._script.enter(request, context)
        return Empty()

    async def ListMemories(self, request: Any, context: Any) -> service.ListMemoriesResponse:
        await self._script.enter(request, context)
        start = int(request.page_token or 0)
        memories = [wire.Memory(name=f"memories/m{i}") for i in range(start, min(start + 2, 5))]
        token = str(start + 2) if start + 2 < 5 else ""
        return service.ListMemoriesResponse(memories=memories, next_page_token=token)

    async def AppendTurns(self, request: Any, context: Any) -> service.AppendTurnsResponse:
        await self._script.enter(request, context)
        names = [f"{request.memory}/documents/{i + 1}" for i in range(len(request.turns))]
        return service.AppendTurnsResponse(revision=7, documents=names)

    async def PutDocuments(self, requests: Any, context: Any) -> service.PutDocumentsResponse:
        received = [message async for message in requests]
        for message in received:
            self._script.requests.append(message)
        if self._script.failures:
            await self._script.failures.pop(0).abort(context)
        return service.PutDocumentsResponse(revision=3, documents=["memories/m/documents/1"])

    async def ImportMemory(self, requests: Any, context: Any) -> service.ImportMemoryResponse:
        messages = [message async for message in requests]
        self._script.headers.append(messages[0].header)
        self._script.received = [message.data for message in messages]
        data = b"".join(self._script.received)
        if self._script.failures:
            await self._script.failures.pop(0).abort(context)
        if messages[0].header.offset and not self._script.keeps:
            lost = {"available": "0"}
            await Failure("FAILED_PRECONDITION", "OFFSET_NOT_AVAILABLE", lost).abort(context)
        memory = wire.Memory(name="memories/imported", text_bytes=len(data))
        return service.ImportMemoryResponse(memory=memory, reused_blocks=1)

    async def _unscripted(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not scripted")

    AttachModel = _unscripted
    CreateMemory = _unscripted
    DetachModel = _unscripted
    ForkMemory = _unscripted
    RestoreMemory = _unscripted
    GetDocument = _unscripted
    ListDocuments = _unscripted
    ListRevisions = _unscripted
    DeleteDocuments = _unscripted
    Retrieve = _unscripted
    ListModels = _unscripted

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._script.enter(request, context)
        async for message in self._script.stream(context):
            yield message

    async def WatchMemory(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._script.enter(request, context)
        async for message in self._script.stream(context):
            yield message

    async def ExportMemory(self, request: Any, context: Any) -> AsyncIterator[Any]:
        await self._script.enter(request, context)
        async for message in self._script.stream(context):
            yield message


@asynccontextmanager
async def serving(script: Script) -> AsyncIterator[str]:
    """The address of a server that follows the script."""
    server = grpc.aio.server()
    rpc.add_MemoryServiceServicer_to_server(_Service(script), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


def answer(*texts: str) -> list[Message | Failure]:
    """The events of a short, complete answer."""
    events: list[Message | Failure] = [
        service.QueryResponse(routing=service.Routing(round=1)),
        service.QueryResponse(citation=service.Citation(number=4, round=1)),
    ]
    events += [service.QueryResponse(text=service.TextDelta(text=text)) for text in texts]
    events.append(service.QueryResponse(usage=service.Usage(answer_tokens=len(texts))))
    events.append(service.QueryResponse(done=service.Done(reason=service.Done.STOP, revision=9)))
    return events
