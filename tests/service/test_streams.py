"""Streams whose client stands still, and connections that are abused: over real sockets."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc import aio

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from tests.support.served import Refusal, Serve, Served, refusal, refused

MIB = 1024 * 1024


async def gone(served: Served) -> None:
    """Returns when no call is inside."""
    async with asyncio.timeout(10):
        await served.server._gate.wait_idle()


async def export_of(served: Served, megabytes: int) -> Any:
    """An export of so much, whose reader has taken the first piece."""
    memory = await served.create("large")

    async def texts() -> AsyncIterator[pb.PutDocumentsRequest]:
        kind = pb.PutDocumentsRequest
        yield kind(header=kind.Header(memory=memory.name))
        for number in range(megabytes):
            yield kind(document_start=kind.DocumentStart())
            # Text that compresses to half of it.
            yield kind(text=random.Random(number).randbytes(MIB // 2).hex())
        yield kind(end=kind.End(documents=megabytes))

    await served.as_operator(served.memories.PutDocuments, texts())
    call = served.as_operator(
        served.memories.ExportMemory, pb.ExportMemoryRequest(name=memory.name)
    )
    first = await call.read()
    assert first.total_bytes > 2 * MIB
    return call


async def rest_of(call: Any) -> Refusal:
    """Reads on to the error that ends it."""
    with pytest.raises(aio.AioRpcError) as caught:
        while await call.read() is not aio.EOF:
            pass
    return refusal(caught.value)


async def test_a_reader_who_stops_is_dropped_with_a_reason(start: Serve) -> None:
    async with start(stream_idle_s=0.5) as served:
        call = await export_of(served, 24)
        await gone(served)
        assert not list(served.server.application.data.staging.iterdir())
        assert served.server.application.progress.subscribers == 0
        answer = await rest_of(call)
        assert (answer.code, answer.reason) == ("DEADLINE_EXCEEDED", "STREAM_TIMEOUT")
        assert answer.metadata == {"quota": "stream_idle_s", "limit": "0.5"}
        assert answer.retry_s


async def test_a_slow_reader_is_served_to_the_end(start: Serve) -> None:
    async with start(stream_idle_s=1.0) as served:
        call = await export_of(served, 12)
        pieces = 1
        while await call.read() is not aio.EOF:
            pieces += 1
            await asyncio.sleep(0.15)
        assert pieces > 3


async def test_a_blocked_stream_ends_with_its_key(start: Serve) -> None:
    async with start() as served:
        call = await export_of(served, 24)
        key = served.as_operator
        made = await key(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)
            ),
        )
        call.cancel()
        await gone(served)
        reading = served.memories.ExportMemory(
            pb.ExportMemoryRequest(name="memories/large"),
            metadata=(("authorization", f"Bearer {made.secret}"),),
        )
        await reading.read()
        await asyncio.sleep(0.3)
        await key(served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=made.api_key.name))
        await gone(served)
        assert (await rest_of(reading)).reason == "CREDENTIAL_INVALID"


async def test_a_sender_who_stops_is_dropped_and_gives_back_what_it_held(start: Serve) -> None:
    async with start(stream_idle_s=0.2) as served:
        memory = await served.create("upload")
        kind = pb.PutDocumentsRequest

        async def stop() -> AsyncIterator[pb.PutDocumentsRequest]:
            yield kind(header=kind.Header(memory=memory.name))
            yield kind(document_start=kind.DocumentStart())
            yield kind(text="a beginning")
            await asyncio.sleep(30)

        answer = await refused(served.as_operator(served.memories.PutDocuments, stop()))
        assert (answer.reason, answer.metadata["quota"]) == ("STREAM_TIMEOUT", "stream_idle_s")
        await gone(served)
        assert await served.texts(memory.name) == []


async def test_no_tenant_takes_every_place_for_archives(start: Serve) -> None:
    kind = pb.ImportMemoryRequest

    async def stop() -> AsyncIterator[pb.ImportMemoryRequest]:
        yield kind(header=kind.Header())
        await asyncio.sleep(30)

    async with start(stream_idle_s=5) as served:
        waiting = [served.as_operator(served.memories.ImportMemory, stop()) for _ in range(2)]
        await asyncio.sleep(0.3)
        answer = await refused(served.as_operator(served.memories.ImportMemory, stop()))
        assert answer.reason == "OVERLOADED"
        assert answer.retry_s
        for call in waiting:
            call.cancel()


async def test_a_stream_lasts_only_so_long(start: Serve) -> None:
    async with start(stream_seconds=1) as served:
        memory = await served.create("watched")
        request = pb.WatchMemoryRequest(name=memory.name)
        answer = await refused(served.as_operator(served.memories.WatchMemory, request))
        assert (answer.reason, answer.metadata["quota"]) == ("STREAM_TIMEOUT", "stream_seconds")
        assert served.server.application.progress.subscribers == 0


async def test_streams_are_slowed_down_to_the_rate(start: Serve) -> None:
    async with start(bytes_per_minute=60 * 4096) as served:
        memory = await served.create("paced")
        kind, loop = pb.PutDocumentsRequest, asyncio.get_running_loop()

        async def texts() -> AsyncIterator[pb.PutDocumentsRequest]:
            yield kind(header=kind.Header(memory=memory.name))
            yield kind(document_start=kind.DocumentStart())
            yield kind(text="x" * 60 * 4096)
            yield kind(text="y" * 2048)
            yield kind(text="z" * 2048)
            yield kind(end=kind.End(documents=1))

        started = loop.time()
        await served.as_operator(served.memories.PutDocuments, texts())
        assert loop.time() - started > 0.5


async def test_metadata_is_bounded(served: Served) -> None:
    request = pb.ListMemoriesRequest()
    with pytest.raises(aio.AioRpcError):
        await served.memories.ListMemories(request, metadata=(("x-padding", "x" * 20_000),))
    await served.as_operator(served.memories.ListMemories, request)


# --- below gRPC ---------------------------------------------------------------------

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS, _PING, _GOAWAY = 4, 6, 7
_ENHANCE_YOUR_CALM = 11


def frame(kind: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, 0]) + bytes(4) + payload


async def connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = served.server.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_pings_without_need_close_the_connection(served: Served) -> None:
    reader, writer = await connect(served)
    writer.write(_PREFACE + frame(_SETTINGS) + frame(_PING, bytes(8)) * 40)
    reasons = []
    async with asyncio.timeout(10):
        while head := await reader.read(9):
            head += await reader.readexactly(9 - len(head))
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            if head[3] == _GOAWAY:
                reasons.append(struct.unpack(">I", payload[4:8])[0])
    assert _ENHANCE_YOUR_CALM in reasons
    writer.close()
    await served.create("still-up")


async def test_connections_are_bounded(start: Serve) -> None:
    async with start(max_connections=3) as served:
        await served.create("first")
        held = [await connect(served) for _ in range(6)]
        for _, writer in held:
            writer.write(_PREFACE + frame(_SETTINGS))
        alive = 0
        for reader, _ in held:
            try:
                async with asyncio.timeout(1):
                    alive += bool(await reader.read(9))
            except (TimeoutError, ConnectionError):
                pass
        assert alive <= 2
        for _, writer in held:
            writer.close()
        await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
