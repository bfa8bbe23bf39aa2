"""WatchMemory."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from grpc import aio

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually
from tests.support.served import refusal, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _watch(served: Asking, memory: str) -> Any:
    return served.as_operator(served.memories.WatchMemory, pb.WatchMemoryRequest(name=memory))


async def _next(call: Any) -> pb.WatchMemoryResponse:
    async with asyncio.timeout(30):
        state: pb.WatchMemoryResponse = await call.read()
    return state


async def test_the_state_comes_at_once_and_then_at_each_change(shared: Asking) -> None:
    memory = await shared.create()
    call = _watch(shared, memory.name)
    first = await _next(call)
    assert first.revision == 0 and first.state == resources.Memory.ACTIVE
    await shared.append(memory.name, "one", "two")
    seen = [first]
    while not (seen[-1].revision == 1 and _ready(seen[-1])):
        seen.append(await _next(call))
    assert seen[-1].encodings[0].encoded_documents == 2
    revisions = [state.revision for state in seen]
    assert revisions == sorted(revisions)
    call.cancel()


def _ready(state: pb.WatchMemoryResponse) -> bool:
    return [e.state for e in state.encodings] == [resources.Encoding.READY]


async def test_a_slow_reader_sees_the_latest_state(shared: Asking) -> None:
    memory = await shared.create()
    call = _watch(shared, memory.name)
    await _next(call)
    for number in range(30):
        await shared.append(memory.name, f"text {number}")
    await shared.ready(memory.name)
    states = 0
    while (await _next(call)).revision < 30:
        states += 1
    assert states <= 60
    call.cancel()


async def test_it_ends_when_the_memory_is_deleted(shared: Asking) -> None:
    memory = await shared.create()
    call = _watch(shared, memory.name)
    await _next(call)
    await shared.delete(memory.name)
    with pytest.raises(aio.AioRpcError) as caught:
        while True:
            await _next(call)
    assert refusal(caught.value).reason == "MEMORY_NOT_FOUND"
    assert (await refused(_watch(shared, memory.name))).reason == "MEMORY_NOT_FOUND"


async def test_cancelled_watchers_leave_nothing_behind(shared: Asking) -> None:
    memory = await shared.create()
    calls = [_watch(shared, memory.name) for _ in range(20)]
    for call in calls:
        await _next(call)
    assert shared.app.progress.subscribers == 20
    for call in calls:
        call.cancel()
    await eventually(lambda: _unwatched(shared))


async def _unwatched(served: Asking) -> bool:
    return served.app.progress.subscribers == 0


async def test_it_ends_when_the_server_drains(start: Serve) -> None:
    async with start() as served:
        memory = await served.create()
        call = _watch(served, memory.name)
        await _next(call)
        draining = asyncio.create_task(served.server.drain(5.0))
        with pytest.raises(aio.AioRpcError) as caught:
            await _next(call)
        assert refusal(caught.value).reason == "DRAINING"
        await draining
