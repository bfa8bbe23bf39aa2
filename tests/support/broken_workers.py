"""Workers that break their contract: a sound worker behind a front that spoils one thing.

The sound one is a real worker process with the fake engine; a front forwards every call
to it, and its subclasses each break one promise.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from grpc import aio
from grpc_status import rpc_status

from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import (
    ModelAdapterServiceServicer,
    ModelAdapterServiceStub,
    add_ModelAdapterServiceServicer_to_server,
)
from tests.support.live_worker import MESSAGE_OPTIONS


class Front(ModelAdapterServiceServicer):
    """Forwards everything, errors and cancellation included."""

    def __init__(self, channel: aio.Channel, identity: str) -> None:
        self.stub: Any = ModelAdapterServiceStub(channel)
        self.identity = identity

    async def GetInfo(self, request: Any, context: Any) -> Any:
        return await self._unary(self.stub.GetInfo(request), context)

    async def Route(self, request: Any, context: Any) -> Any:
        return await self._unary(self.stub.Route(request), context)

    async def Evict(self, request: Any, context: Any) -> Any:
        return await self._unary(self.stub.Evict(request), context)

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in self._stream(self.stub.Encode(request), context):
            yield reply

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in self._stream(self.stub.Query(request), context):
            yield reply

    @staticmethod
    async def _unary(call: Any, context: Any) -> Any:
        try:
            return await call
        except aio.AioRpcError as error:
            await _pass_on(error, context)

    @staticmethod
    async def _stream(call: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for reply in call:
                yield reply
        except aio.AioRpcError as error:
            await _pass_on(error, context)
        finally:
            call.cancel()


async def _pass_on(error: aio.AioRpcError, context: Any) -> None:
    await context.abort_with_status(rpc_status.to_status(rpc_status.from_call(error)))


class Restless(Front):
    """Makes another block each time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._count = itertools.count(1)

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in super().Encode(request, context):
            if reply.block.value:
                bits = bytes([0, 64 + next(self._count) % 32])
                reply.block.value = bits * (len(reply.block.value) // 2)
            yield reply


class Careless(Front):
    """Takes any identity for its own."""

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        request.identity = self.identity
        async for reply in super().Encode(request, context):
            yield reply

    async def Route(self, request: Any, context: Any) -> Any:
        request.memory.identity = self.identity
        return await super().Route(request, context)


class Miscounting(Front):
    """Says one chunk more than the block's tokens make."""

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in super().Encode(request, context):
            reply.block.chunks += 1
            yield reply


class Poisoned(Front):
    """Puts values that are no numbers into blocks."""

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for reply in super().Encode(request, context):
            if reply.block.value:
                reply.block.value = b"\xc0\x7f" + reply.block.value[2:]
            yield reply


class Forgetful(Front):
    """Leaves the last document of a request unanswered."""

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        last = request.documents[-1].number if len(request.documents) > 1 else 0
        async for reply in super().Encode(request, context):
            if reply.number != last:
                yield reply


class Truncating(Front):
    """Encodes the beginning of a document that is too long instead of refusing it."""

    async def Encode(self, request: Any, context: Any) -> AsyncIterator[Any]:
        for document in request.documents:
            document.text = document.text[:2_000]
        async for reply in super().Encode(request, context):
            yield reply


class Deaf(Front):
    """Ranks by number, whatever the question."""

    async def Route(self, request: Any, context: Any) -> Any:
        limit, request.limit = request.limit, 100
        request.question = "Anna Bob garden cake dentist boiler Mittens train"
        reply = await super().Route(request, context)
        found = sorted(reply.documents, key=lambda document: document.number)[:limit]
        for rank, document in enumerate(found):
            document.score = -float(rank)
        return pb.RouteResponse(documents=found)


class Prophetic(Front):
    """Sees documents above last_number."""

    async def Route(self, request: Any, context: Any) -> Any:
        request.memory.last_number += 100
        return await super().Route(request, context)


class Clinging(Front):
    """Goes on ranking documents that were deleted: reads no epoch, evicts nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._known: dict[tuple[str, str, int], Any] = {}

    async def Route(self, request: Any, context: Any) -> Any:
        memory = request.memory
        key = (memory.tenant, memory.memory_uid, memory.last_number)
        if request.memory.deletion_epoch and key in self._known:
            return self._known[key]
        reply = await super().Route(request, context)
        return self._known.setdefault(key, reply) if request.memory.deletion_epoch == 0 else reply


class Indiscriminate(Front):
    """Says that it knows filters, and heeds none."""

    async def Route(self, request: Any, context: Any) -> Any:
        request.ClearField("filter")
        return await super().Route(request, context)


class Unaware(Front):
    """Of an earlier version: knows no filters, and says nothing of them."""

    async def GetInfo(self, request: Any, context: Any) -> Any:
        reply = await super().GetInfo(request, context)
        reply.ClearField("filters")
        return reply


class Heedless(Front):
    """Says that it heeds what was deleted, and ranks it as ever."""

    async def Route(self, request: Any, context: Any) -> Any:
        request.memory.ClearField("removed")
        return await super().Route(request, context)


class Unheeding(Front):
    """Of an earlier version: does not know that documents may be deleted and still there."""

    async def GetInfo(self, request: Any, context: Any) -> Any:
        reply = await super().GetInfo(request, context)
        reply.ClearField("removals")
        return reply


class Mixing(Front):
    """Finds a memory by its uid alone, whoever's it is."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._owners: dict[str, str] = {}

    async def Route(self, request: Any, context: Any) -> Any:
        uid = request.memory.memory_uid
        request.memory.tenant = self._owners.setdefault(uid, request.memory.tenant)
        return await super().Route(request, context)


class Abrupt(Front):
    """Ends answers without their last event."""

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        async for event in super().Query(request, context):
            if event.WhichOneof("event") != "finished":
                yield event


class Verbose(Front):
    """Generates more than it may."""

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        request.max_answer_tokens += 5
        async for event in super().Query(request, context):
            yield event


class Moody(Front):
    """Answers otherwise each time."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._count = itertools.count(1)

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        mood = next(self._count)
        async for event in super().Query(request, context):
            if event.WhichOneof("event") == "text":
                event.text.text += str(mood)
            yield event


class Confused(Front):
    """Cites somebody else's document when it has much to do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._running = 0

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self._running += 1
        await asyncio.sleep(0.05)
        busy = self._running > 1
        async for event in super().Query(request, context):
            if event.WhichOneof("event") == "citation" and busy:
                event.citation.number = 1 + event.citation.number % 8
            yield event
        self._running -= 1


class Tireless(Front):
    """Works on after its caller has left."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._working: set[asyncio.Task[None]] = set()

    async def Query(self, request: Any, context: Any) -> AsyncIterator[Any]:
        events: asyncio.Queue[Any] = asyncio.Queue()
        work = asyncio.create_task(self._work(request, events))
        self._working.add(work)
        while (event := await events.get()) is not None:
            if isinstance(event, aio.AioRpcError):
                await _pass_on(event, context)
            yield event

    async def _work(self, request: Any, events: asyncio.Queue[Any]) -> None:
        try:
            async for event in self.stub.Query(request):
                events.put_nowait(event)
        except aio.AioRpcError as error:
            events.put_nowait(error)
        events.put_nowait(None)


@asynccontextmanager
async def worker_behind(front: type[Front], sound: str, folder: Path) -> AsyncIterator[str]:
    """The address of a front, on a socket in `folder`, before the sound worker at `sound`."""
    async with aio.insecure_channel(sound, options=MESSAGE_OPTIONS) as channel:
        stub: Any = ModelAdapterServiceStub(channel)
        info = await stub.GetInfo(pb.GetInfoRequest(), wait_for_ready=True)
        server = aio.server(options=MESSAGE_OPTIONS)
        add_ModelAdapterServiceServicer_to_server(front(channel, info.identity), server)
        address = f"unix:{folder}/front.sock"
        server.add_insecure_port(address)
        await server.start()
        try:
            yield address
        finally:
            await server.stop(0)
