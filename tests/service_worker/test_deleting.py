"""Deleting a memory, or documents of it, in the middle of everything else that goes on with it."""

from __future__ import annotations

import asyncio

import pytest
from grpc import aio

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import memory_uid
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking
from tests.support.served import refusal

#: What a call may answer whose memory was deleted under it.
GONE = {"MEMORY_NOT_FOUND", "WORKER_UNAVAILABLE", "DOCUMENT_NOT_FOUND"}


async def ended(call: object) -> str:
    """Reads a call to its end; "" or the reason of its refusal."""
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call  # type: ignore[misc]  # a unary call: streams were taken above
    except aio.AioRpcError as error:
        return refusal(error).reason
    return ""


async def filled(served: Asking, memory_id: str, documents: int = 60) -> str:
    memory = await served.create(memory_id)
    await served.append(memory.name, *(f"text {n} of {memory_id}" for n in range(documents)))
    return str(memory.name)


async def nothing_is_left(served: Asking, uid: str) -> None:
    """In keys, store and worker."""
    application = served.server.application
    tenant = await application.catalog.get_tenant("default")
    keys = application.keys.tenant(tenant.uid)
    assert keys is not None
    assert bytes.fromhex(uid) not in keys.memories()
    held = await application.stores.read(tenant.uid, lambda store: store.memories())
    assert bytes.fromhex(uid) not in held
    for worker in application.workers.served():
        info = await worker.client.info(5)
        assert info.residency.resident_memories == 0
        assert info.residency.routing_bytes == info.residency.content_bytes == 0


@pytest.mark.parametrize("pause_s", [0.0, 0.02, 0.1])
async def test_a_memory_is_deleted_while_it_is_encoded_asked_and_exported(
    start: Serve, pause_s: float
) -> None:
    async with start(worker_model="fake:encode_ms=2,step_ms=5") as served:
        await filled(served, "first", 3)
        await served.ask("memories/first", "text 1")
        gone = pb.DeleteMemoryRequest(name="memories/first")
        await served.as_operator(served.memories.DeleteMemory, gone)
        name = await filled(served, "herons")
        tenant = await served.app.catalog.get_tenant("default")
        row = await served.app.catalog.get_memory(tenant.uid, "herons")
        calls = [
            served.stream(name, "text 7"),
            served.as_operator(served.memories.ExportMemory, pb.ExportMemoryRequest(name=name)),
            served.stream(name, "text 9"),
            served.append(name, "one more"),
        ]
        running = [asyncio.create_task(ended(call)) for call in calls]
        await asyncio.sleep(pause_s)
        delete = pb.DeleteMemoryRequest(name=name)
        twice = await asyncio.gather(
            *(ended(served.as_operator(served.memories.DeleteMemory, delete)) for _ in range(2))
        )
        assert sorted(twice) == ["", "MEMORY_NOT_FOUND"]
        await nothing_is_left(served, row.uid)
        assert {reason for reason in await asyncio.gather(*running) if reason} <= GONE
        await nothing_is_left(served, row.uid)


async def test_documents_are_deleted_while_they_are_encoded_and_asked_for(start: Serve) -> None:
    async with start(worker_model="fake:encode_ms=2,step_ms=2") as served:
        name = await filled(served, "herons", 40)
        row = await served.app.catalog.get_memory(
            (await served.app.catalog.get_tenant("default")).uid, "herons"
        )
        for batch in ([3, 4], [11], [20, 21, 22, 40], [1]):
            asking = [asyncio.create_task(ended(served.stream(name, f"text {n}"))) for n in batch]
            names = [f"{name}/documents/{number}" for number in batch]
            delete = pb.DeleteDocumentsRequest(parent=name, names=names)
            assert await ended(served.as_operator(served.memories.DeleteDocuments, delete)) == ""
            assert {reason for reason in await asyncio.gather(*asking) if reason} <= GONE
        gone = {3, 4, 11, 20, 21, 22, 40, 1}
        answer = await served.ask(name, "text 5 of herons")
        assert answer.done is not None
        assert not gone.intersection(answer.cited)
        texts = await served.texts(name)
        assert texts == [f"text {n - 1} of herons" for n in range(1, 41) if n not in gone]
        keys = served.app.keys.tenant(row.tenant_uid)
        assert keys is not None
        assert keys.of(memory_uid(row)).generation == 4
