"""Evictions of a real worker process that is busy with something else."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import aio

from model_adapter.engine import DocumentText
from model_adapter.errors import InterruptedQueryError
from model_adapter.fake import FakeEngine
from model_adapter.jobs import RouteJob
from model_adapter.pager import Budgets
from model_adapter.scheduler import Scheduler
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.store import EncodingId
from tests.support.blocks import make_document
from tests.support.jobs import ListSink, eventually
from tests.support.live_worker import Client, WorkerProcess, connected, error_info
from tests.support.pages import World, key, uid

TENANT, OTHER_TENANT = "1a" * 16, "1b" * 16
MEMORY = "c0" * 16


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[WorkerProcess]:
    """A document takes longer than an eviction waits for the batch that it is in."""
    running = WorkerProcess(tmp_path, "fake:encode_ms=4500")
    yield running
    running.stop()


async def test_an_eviction_does_not_wait_for_a_long_document(slow: WorkerProcess) -> None:
    async with connected(slow) as client:
        mine, other = (
            client.encode(tenant, MEMORY, [(1, "a boat")]) for tenant in (TENANT, OTHER_TENANT)
        )
        batches = [asyncio.create_task(_outcome(call)) for call in (mine, other)]
        assert await _evicted(client, OTHER_TENANT, batches[1]) == "WORKER_UNAVAILABLE"
        assert not batches[0].done(), "the other document's turn had not come"
        assert await _evicted(client, TENANT, batches[0]) == "WORKER_UNAVAILABLE"
        assert await client.answer(client.ref(TENANT, MEMORY, 1), "Which boat?")
        assert slow.process.poll() is None


async def _evicted(client: Client, tenant: str, batch: asyncio.Task[str]) -> str:
    """Evicts until the batch, which may still be on its way to the worker, has ended."""
    while not batch.done():
        await client.stub.Evict(pb.EvictRequest(tenant=tenant, memory_uid=MEMORY), timeout=10)
    return await batch


async def _outcome(call: aio.UnaryStreamCall[pb.EncodeRequest, pb.EncodeResponse]) -> str:
    try:
        return f"document {[reply.number async for reply in call]}"
    except aio.AioRpcError as error:
        return str(error_info(error).reason)


DOCUMENTS = 40


def test_who_reads_a_memory_through_stops_at_the_next_slab() -> None:
    """It does not fit the device, so that every routing reads all of it from the store."""
    engine = FakeEngine()
    own = engine.description
    world = World(
        own.layout, Budgets(0, 0, slab_bytes=1), EncodingId(bytes.fromhex(own.identity)[:16])
    )
    numbers = range(1, DOCUMENTS + 1)
    blocks = engine.encode([DocumentText(n, f"this is document {n}") for n in numbers]).blocks
    store = world.store()
    store.put_documents(uid(key(1)), [make_document(n) for n in numbers])
    store.put_blocks(uid(key(1)), world.encoding, own.layout, blocks)
    scheduler = Scheduler(engine)
    job = RouteJob(key(1), sink := ListSink(), question="document", limit=1)
    scheduler.admit(job)
    lease = world.pager.lease(key(1), DOCUMENTS, 0, job.unwanted)
    load, reads = store.load_routing, list[object]()

    def evicted_meanwhile(*arguments: object, **options: object) -> object:
        reads.append(arguments)
        if len(reads) == 2:
            threading.Thread(target=scheduler.stop_memory, args=(key(1).tenant,)).start()
            eventually(lambda: job.stopping is not None, "the eviction has begun")
        return load(*arguments, **options)  # type: ignore[arg-type]  # passed on as they came

    store.load_routing = evicted_meanwhile  # type: ignore[method-assign,assignment]  # a spy
    scheduler.queue(job, lease, lease.release)
    scheduler.start()
    assert isinstance(sink.wait().error, InterruptedQueryError)
    assert len(reads) == 2
    assert world.pager.residency().memories == 1, "nothing is wrong with what is known of it"
    world.pager.evict("", timeout_s=0)
    scheduler.drain(0)
    world.pager.check_integrity()
