"""At the worker: a memory's uid with another tenant's is a memory that never was."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from model_adapter.v1 import model_adapter_pb2 as pb
from tests.support.live_worker import Client, WorkerProcess, connected

VICTIM, ATTACKER, NOBODY = "aa" * 16, "bb" * 16, "ee" * 16
MEMORY, OTHER, NEVER = "c0" * 16, "c1" * 16, "cf" * 16
SECRET, QUESTION = "Anna hid the spare key under the birdhouse", "Where did Anna hide the key?"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    running = WorkerProcess(tmp_path_factory.mktemp("data"))
    yield running
    running.stop()


@pytest.fixture
async def client(worker: WorkerProcess) -> AsyncIterator[Client]:
    async with connected(worker) as client:
        yield client


async def seen(client: Client, ref: pb.MemoryRef) -> list[bytes]:
    """Everything that an answer and a ranking say, but for their times."""
    shown: list[bytes] = []
    async for event in client.query(ref, QUESTION):
        for name in ("queue_ms", "page_in_ms", "routing_ms", "time_to_first_token_ms", "total_ms"):
            if event.HasField("finished"):
                event.finished.ClearField(name)
        shown.append(event.SerializeToString(deterministic=True))
    request = pb.RouteRequest(memory=ref, question=QUESTION, limit=5)
    shown.append((await client.stub.Route(request)).SerializeToString(deterministic=True))
    return shown


async def test_one_tenants_memory_is_not_there_for_another(client: Client) -> None:
    await client.fill(VICTIM, MEMORY, [SECRET])
    await client.fill(ATTACKER, OTHER, ["The attacker likes tea"])
    # Now it is resident: a cache that forgot the tenant would show it.
    assert b"birdhouse" in b"".join(await seen(client, client.ref(VICTIM, MEMORY, 1)))
    never = await seen(client, client.ref(ATTACKER, NEVER, 1))
    assert b"birdhouse" not in b"".join(never)
    for tenant in (ATTACKER, NOBODY):
        assert await seen(client, client.ref(tenant, MEMORY, 1)) == never


async def test_evicting_with_another_tenant_leaves_it_alone(client: Client) -> None:
    before = (await client.stub.GetInfo(pb.GetInfoRequest())).residency.routing_bytes
    evicted = await client.stub.Evict(pb.EvictRequest(tenant=NOBODY, memory_uid=MEMORY))
    assert evicted.freed_bytes == 0
    after = (await client.stub.GetInfo(pb.GetInfoRequest())).residency.routing_bytes
    assert after == before
