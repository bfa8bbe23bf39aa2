"""One tenant floods; another is served before most of what it sent. Counted, not timed."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking
from tests.support.served import Caller, turns

FLOOD = 45


async def newcomer(served: Asking) -> Caller:
    """Another tenant's key, and a memory of its own."""
    await served.as_operator(served.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="late"))
    key = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/late", api_key=admin.ApiKey(scope=admin.READ_WRITE)
        ),
    )
    caller = Caller(key.secret)
    await caller(served.memories.CreateMemory, pb.CreateMemoryRequest(memory_id="mine"))
    return caller


async def append(served: Asking, caller: Caller, memory: str, count: int) -> int:
    request = pb.AppendTurnsRequest(
        memory=memory,
        turns=turns(*[f"The boat number {n} is in the harbour." for n in range(count)]),
    )
    reply: pb.AppendTurnsResponse = await caller(served.memories.AppendTurns, request)
    return reply.revision


async def whole(call: Any) -> None:
    async for _ in call:
        pass


async def test_questions(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=40") as served:
        late = await newcomer(served)
        await append(served, late, "memories/mine", 3)
        await served.create("flood")
        await append(served, served.as_operator, "memories/flood", 3)
        await served.ask("memories/flood", "Where is the boat?")

        def ask(caller: Caller, memory: str) -> asyncio.Task[None]:
            request = pb.QueryRequest(memory=memory, question="Where is the boat?")
            return asyncio.ensure_future(whole(caller(served.memories.Query, request)))

        flood = [ask(served.as_operator, "memories/flood") for _ in range(FLOOD)]
        await asyncio.sleep(0.05)
        await ask(late, "memories/mine")
        assert sum(not task.done() for task in flood) > FLOOD // 2
        done = await asyncio.gather(*flood, return_exceptions=True)
        assert not [error for error in done if error is not None]


async def test_encoding(start: Serve) -> None:
    """Many memories of one tenant wait; the one memory of another does not wait for all."""
    settings: dict[str, object] = {"encode_batch_documents": 4}
    async with start(worker_model="fake:encode_ms=10", **settings) as served:
        late = await newcomer(served)
        for number in range(20):
            await served.create(f"flood{number:02}")
            await append(served, served.as_operator, f"memories/flood{number:02}", 20)
        revision = await append(served, late, "memories/mine", 2)
        watch = late(served.memories.WatchMemory, pb.WatchMemoryRequest(name="memories/mine"))
        async for state in watch:
            if any(one.encoded_revision >= revision for one in state.encodings):
                break
        watch.cancel()
        listed: pb.ListMemoriesResponse = await served.as_operator(
            served.memories.ListMemories, pb.ListMemoriesRequest()
        )
        waiting = sum(
            encoding.state != resources.Encoding.READY
            for memory in listed.memories
            for encoding in memory.encodings
        )
        assert waiting > 10


async def test_a_full_line_refuses_the_flood_alone(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=50", max_concurrent_calls=300) as served:
        late = await newcomer(served)
        await append(served, late, "memories/mine", 3)
        await served.create("flood")
        await append(served, served.as_operator, "memories/flood", 3)
        await served.ask("memories/flood", "Where is the boat?")
        request = pb.QueryRequest(memory="memories/flood", question="Where is the boat?")
        flood = [
            asyncio.ensure_future(whole(served.as_operator(served.memories.Query, request)))
            for _ in range(120)
        ]
        # Refusals of one tenant come slower and slower, but they come.
        async with asyncio.timeout(30):
            while sum(task.done() for task in flood) < 30:  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(0.01)
        mine = pb.QueryRequest(memory="memories/mine", question="Where is the boat?")
        await whole(late(served.memories.Query, mine))
        refused = [
            task.exception() for task in flood if task.done() and task.exception() is not None
        ]
        assert len(refused) >= 20
        assert all(
            isinstance(error, aio.AioRpcError) and error.code().name == "RESOURCE_EXHAUSTED"
            for error in refused
        )
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
