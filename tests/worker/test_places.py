"""Threads that page memories in are shared out: no memory and no tenant has all of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from grpc import aio

from model_adapter.engine import DocumentText
from model_adapter.fake import FakeEngine
from model_adapter.places import Places
from model_adapter.residency import MemoryKey
from model_adapter.scheduler import Scheduler
from model_adapter.service import ModelAdapter
from model_adapter.v1 import model_adapter_pb2 as pb
from model_adapter.v1.model_adapter_pb2_grpc import (
    ModelAdapterServiceStub,
    add_ModelAdapterServiceServicer_to_server,
)
from storage.store import EncodingId
from tests.support.blocks import make_document
from tests.support.live_worker import error_info
from tests.support.pages import OTHER_TENANT, TENANT, World, key, uid

QUESTION = "What is this document?"
MANY = 20


class Slow:
    """A worker in this process. `read`: the store of TENANT is read once it is set."""

    def __init__(self, stub: Any, engine: FakeEngine, read: threading.Event) -> None:
        self.stub = stub
        self.engine = engine
        self.read = read

    def route(self, memory: MemoryKey) -> Any:
        """The call."""
        ref = pb.MemoryRef(
            tenant=memory.tenant,
            memory_uid=memory.memory,
            last_number=1,
            identity=self.engine.description.identity,
        )
        request = pb.RouteRequest(memory=ref, question=QUESTION, limit=1)
        return self.stub.Route(request, timeout=15)


@pytest.fixture
async def slow(tmp_path: Path) -> AsyncIterator[Slow]:
    async with _slow(tmp_path) as worker:
        yield worker
        worker.read.set()


@asynccontextmanager
async def _slow(folder: Path) -> AsyncIterator[Slow]:
    engine, read = FakeEngine(), threading.Event()
    own = engine.description
    world = World(own.layout, encoding=EncodingId(bytes.fromhex(own.identity)[:16]))
    for memory in (key(1), key(2), key(1, OTHER_TENANT)):
        (block,) = engine.encode([DocumentText(1, "this is document 1")]).blocks
        world.store(memory.tenant).put_documents(uid(memory), [make_document(1)])
        world.store(memory.tenant).put_blocks(uid(memory), world.encoding, own.layout, [block])
    store = world.store(TENANT)
    numbers = store.block_numbers

    def waiting(*arguments: Any) -> list[int]:
        assert read.wait(60)
        return numbers(*arguments)

    store.block_numbers = waiting  # type: ignore[method-assign,assignment]  # real, and late
    scheduler = Scheduler(engine)
    service = ModelAdapter(own, scheduler, world.pager, world.budgets)
    server = aio.server()
    add_ModelAdapterServiceServicer_to_server(service, server)
    address = f"unix:{folder}/w.sock"
    server.add_insecure_port(address)
    scheduler.start()
    await server.start()
    try:
        async with aio.insecure_channel(address) as channel:
            yield Slow(ModelAdapterServiceStub(channel), engine, read)
    finally:
        read.set()
        await asyncio.to_thread(scheduler.drain, 0)
        await server.stop(1)
        await asyncio.to_thread(service.close)
        world.pager.evict("", timeout_s=0)  # Raises if a lease was not given back.
        world.pager.check_integrity()


async def test_a_memory_that_is_long_in_coming_holds_up_no_other(slow: Slow) -> None:
    asking = [asyncio.create_task(_ranked(slow.route(key(1)))) for _ in range(MANY)]
    asking.append(asyncio.create_task(_ranked(slow.route(key(2)))))
    await asyncio.wait(asking, timeout=0.2)
    assert await _ranked(slow.route(key(1, OTHER_TENANT))) == [1]
    assert not any(task.done() for task in asking)
    slow.read.set()
    assert await asyncio.gather(*asking) == [[1]] * len(asking)


async def test_who_leaves_while_waiting_takes_no_place_along(slow: Slow) -> None:
    calls = [slow.route(key(1)) for _ in range(MANY)]
    staying = asyncio.create_task(_ranked(slow.route(key(1))))
    await asyncio.wait([staying], timeout=0.2)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    slow.read.set()
    assert await staying == [1]
    assert await asyncio.gather(*(_ranked(slow.route(key(1))) for _ in range(5))) == [[1]] * 5


async def test_an_evicted_memory_s_questions_end_though_they_wait_for_a_place(slow: Slow) -> None:
    asking = [asyncio.create_task(_ranked(slow.route(key(1)))) for _ in range(MANY)]
    await asyncio.wait(asking, timeout=0.2)
    evict = pb.EvictRequest(tenant=TENANT, memory_uid=key(1).memory)
    evicting = asyncio.ensure_future(slow.stub.Evict(evict))
    await asyncio.wait([evicting], timeout=0.2)
    slow.read.set()
    await evicting
    assert await asyncio.gather(*asking) == ["WORKER_UNAVAILABLE"] * MANY


async def test_a_tenant_has_most_places_and_not_all() -> None:
    places = Places(16)
    waiting = [asyncio.create_task(places.take(key(n))) for n in range(20)]
    await _settled()
    assert [task.done() for task in waiting] == [True] * 13 + [False] * 7
    await places.take(key(1, OTHER_TENANT))
    for number in range(13):
        places.give_back(key(number))
    await asyncio.gather(*waiting)


async def test_a_memory_has_two_places() -> None:
    places = Places(16)
    waiting = [asyncio.create_task(places.take(key(1))) for _ in range(4)]
    await _settled()
    assert [task.done() for task in waiting] == [True, True, False, False]
    places.give_back(key(1))
    await waiting[2]


async def test_a_place_is_not_lost_with_who_leaves() -> None:
    """In line, or just as its turn has come."""
    places = Places(2)
    await places.take(key(1))
    await places.take(key(2))
    in_line, at_its_turn, last = (asyncio.create_task(places.take(key(n))) for n in (3, 4, 5))
    await _settled()
    in_line.cancel()
    await _settled()
    places.give_back(key(1))
    at_its_turn.cancel()
    await last
    assert in_line.cancelled() and at_its_turn.cancelled()


async def _settled() -> None:
    """Once every task has gone as far as it can."""
    for _ in range(3):
        await asyncio.sleep(0)


async def _ranked(call: Any) -> list[int] | str:
    try:
        return [document.number for document in (await call).documents]
    except aio.AioRpcError as error:
        return str(error_info(error).reason)
