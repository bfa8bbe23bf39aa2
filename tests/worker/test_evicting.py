"""Evictions of a real worker process that is busy with something else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from grpc import aio

from model_adapter.v1 import model_adapter_pb2 as pb
from tests.support.live_worker import Client, WorkerProcess, connected, error_info

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
