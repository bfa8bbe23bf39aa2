"""A real worker process, spoken to as memsvc does."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import lmdb
import pytest
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_adapter.engine import DocumentText
from model_adapter.fake import NOTHING_FOUND, FakeEngine
from model_adapter.v1 import model_adapter_pb2 as pb
from storage.keys import Kind, block_key
from storage.store import MemoryUid
from tests.support.blocks import same_block
from tests.support.live_worker import (
    Client,
    WorkerProcess,
    connected,
    error_info,
    has_retry_info,
    rest,
)

TEXTS = [
    "Anna bought a red sailing boat in Kiel last spring",
    "Bob plays chess with Carla every Friday evening in the library",
    "The garden needs water when summer turns dry",
]
BOAT, CHESS = "Which boat did Anna buy?", "Who plays chess?"
MEMORY = "c0" * 16


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """Shared by the tests of this module, each with a tenant of its own."""
    running = WorkerProcess(tmp_path_factory.mktemp("data"))
    yield running
    assert running.stop() == 0
    assert "chess" not in running.logs() + running.first_line, "no user text in logs"


@pytest.fixture
async def client(worker: WorkerProcess) -> AsyncIterator[Client]:
    async with connected(worker) as client:
        yield client


@pytest.fixture
def tenant(request: pytest.FixtureRequest) -> str:
    return f"{abs(hash(request.node.nodeid)):032x}"[:32]


async def test_info_and_health(client: Client, worker: WorkerProcess) -> None:
    own = FakeEngine().description
    assert (client.info.model_id, client.info.identity) == (own.model_id, own.identity)
    assert client.layout == own.layout
    assert client.info.residency.routing_budget_bytes == 2**30
    assert 100_000 < client.info.max_document_tokens < own.max_document_tokens
    assert worker.socket.stat().st_mode & 0o777 == 0o600
    async with aio.insecure_channel(worker.address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert (await check).status == health_pb2.HealthCheckResponse.SERVING


async def test_blocks_are_the_engines(client: Client, tenant: str) -> None:
    documents = list(enumerate(TEXTS, 1))
    replies = {r.number: r async for r in client.encode(tenant, MEMORY, documents)}
    own = FakeEngine().encode([DocumentText(n, text) for n, text in documents]).blocks
    assert sorted(replies) == [1, 2, 3]
    assert all(same_block(client.block(replies[block.number]), block) for block in own)


async def test_a_question_is_answered_from_what_was_stored(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS)
    ref = client.ref(tenant, MEMORY, 3)
    events = [event async for event in client.query(ref, BOAT)]
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[:2] == ["routing", "citation"]
    assert set(kinds[2:-1]) == {"text"}
    assert events[0].routing.documents[0].number == 1
    assert [layer.layer for layer in events[0].routing.documents[0].layers] == [1, 3]
    assert "".join(event.text.text for event in events) == TEXTS[0]
    done = events[-1].finished
    assert done.reason == pb.Finished.STOP
    assert (done.question_tokens, done.answer_tokens, done.routed_documents) == (5, 10, 3)
    assert 0 < done.page_in_ms < done.time_to_first_token_ms < done.total_ms
    assert (await client.quiet()).resident_memories >= 1


async def test_new_documents_are_seen_and_later_ones_are_not(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS[:1])
    assert await client.answer(client.ref(tenant, MEMORY, 1), CHESS) == (NOTHING_FOUND, [])
    await client.fill(tenant, MEMORY, TEXTS[1:], first=2)
    assert await client.answer(client.ref(tenant, MEMORY, 1), CHESS) == (NOTHING_FOUND, [])
    assert await client.answer(client.ref(tenant, MEMORY, 3), CHESS) == (TEXTS[1], [2])


async def test_ranking(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS)
    request = pb.RouteRequest(memory=client.ref(tenant, MEMORY, 3), question=CHESS, limit=1)
    (found,) = (await client.stub.Route(request)).documents
    assert found.number == 2
    assert found.score > 1
    empty = pb.RouteRequest(memory=client.ref(tenant, "00" * 16, 3), question=CHESS, limit=1)
    assert not (await client.stub.Route(empty)).documents


async def test_a_ranking_says_where_its_scores_come_from(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS)

    async def route(**more: Any) -> pb.RouteResponse:
        ref = client.ref(tenant, MEMORY, 3)
        return await client.stub.Route(pb.RouteRequest(memory=ref, question=CHESS, limit=3, **more))

    alone, words, both = (
        await route(),
        await route(lexical_weight=1),
        await route(lexical_weight=0.5),
    )
    assert alone.lexical_weight == 0 and words.lexical_weight == 1 and both.lexical_weight == 0.5
    (routed,) = alone.documents
    assert routed.score == routed.routing_score > 1
    assert routed.lexical_score == 0
    for blended in (words, both):
        best = blended.documents[0]
        assert best.number == routed.number
        assert best.score == 1, "the best of both lists"
        assert best.routing_score == routed.routing_score
        assert best.lexical_score > 0
    assert (await route(lexical_weight=0)) == alone


async def test_words_are_forgotten_with_their_memory(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS)
    ref = client.ref(tenant, MEMORY, 3)
    call = client.stub.Query(pb.QueryRequest(memory=ref, question=CHESS, lexical_weight=0.5))
    events = [event async for event in call]
    assert events[0].routing.lexical_weight == 0.5
    assert events[-1].finished.lexical_ms > 0
    before = (await client.stub.GetInfo(pb.GetInfoRequest())).residency
    assert 0 < before.lexical_bytes < before.lexical_budget_bytes
    await client.stub.Evict(pb.EvictRequest(tenant=tenant, memory_uid=MEMORY))
    after = (await client.stub.GetInfo(pb.GetInfoRequest())).residency
    assert after.lexical_bytes < before.lexical_bytes


async def test_tenants_with_the_same_memory_uid(client: Client, tenant: str) -> None:
    other = tenant[::-1]
    await client.fill(tenant, MEMORY, TEXTS[:1])
    await client.fill(other, MEMORY, TEXTS[1:])
    assert await client.answer(client.ref(tenant, MEMORY, 9), BOAT) == (TEXTS[0], [1])
    assert await client.answer(client.ref(other, MEMORY, 9), BOAT) == (NOTHING_FOUND, [])
    assert await client.answer(client.ref(other, MEMORY, 9), CHESS) == (TEXTS[1], [1])


async def test_a_document_too_long_fails_alone(client: Client, tenant: str) -> None:
    """Of 180,000 words the engine makes a block that no message holds."""
    limit = client.info.max_document_tokens
    documents = [(1, "short"), (2, "word " * 180_000), (3, "word " * 20_000), (4, "end")]
    replies = {r.number: r async for r in client.encode(tenant, MEMORY, documents)}
    failure = replies.pop(2).failure
    assert failure.reason == "DOCUMENT_TOO_LONG"
    assert failure.metadata == {"limit": str(limit), "actual": "180000"}
    assert replies[3].ByteSize() > 4 * 2**20, "more than gRPC allows unless told"
    assert client.block(replies[3]).tokens == 20_000
    assert sorted(replies) == [1, 3, 4]


async def test_another_models_identity_is_refused(client: Client, tenant: str) -> None:
    ref = client.ref(tenant, MEMORY, 1)
    ref.identity = "ff" * 32
    calls: list[Any] = [
        client.stub.Route(pb.RouteRequest(memory=ref, question="q", limit=1)),
        client.query(ref, "q").read(),
        client.encode(tenant, MEMORY, [(1, "text")], identity="ff" * 32).read(),
    ]
    for call in calls:
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert error_info(caught.value).reason == "MODEL_MISMATCH"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("memory.tenant", {"tenant": "../../../etc"}),
        ("memory.tenant", {"tenant": "A" * 32}),
        ("memory.memory_uid", {"memory_uid": ""}),
        ("question", {"question": " "}),
        ("top_k", {"top_k": -1}),
        ("max_answer_tokens", {"max_answer_tokens": -1}),
        ("max_rounds", {"max_rounds": -5}),
        ("temperature", {"temperature": math.nan}),
        ("top_p", {"top_p": 1.5}),
        ("lexical_weight", {"lexical_weight": 1.5}),
        ("lexical_weight", {"lexical_weight": math.nan}),
    ],
)
async def test_a_malformed_query_names_the_field(
    client: Client, tenant: str, field: str, change: dict[str, Any]
) -> None:
    ref = client.ref(tenant, MEMORY, 1)
    request = pb.QueryRequest(memory=ref, question="q")
    for name, value in change.items():
        target: Any = request.memory if field.startswith("memory.") else request
        setattr(target, name, value)
    with pytest.raises(aio.AioRpcError) as caught:
        await client.stub.Query(request).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).metadata["field"] == field


@pytest.mark.parametrize(
    ("reason", "documents"),
    [
        ("FIELD_INVALID", []),
        ("FIELD_INVALID", [(0, "text")]),
        ("FIELD_INVALID", [(1, "text"), (1, "text")]),
        ("TOO_MANY_ITEMS", [(n, "text") for n in range(1, 258)]),
    ],
    ids=["none", "zero", "twice", "many"],
)
async def test_a_malformed_encode_is_refused(
    client: Client, tenant: str, reason: str, documents: list[tuple[int, str]]
) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.encode(tenant, MEMORY, documents).read()
    assert error_info(caught.value).reason == reason


async def test_a_malformed_ranking_or_eviction_is_refused(client: Client, tenant: str) -> None:
    ref = client.ref(tenant, MEMORY, 1)
    calls: list[Any] = [
        client.stub.Route(pb.RouteRequest(memory=ref, question="q", limit=limit))
        for limit in (0, 101)
    ]
    calls.append(client.stub.Evict(pb.EvictRequest(tenant="x")))
    calls.append(client.stub.Evict(pb.EvictRequest(tenant=tenant, memory_uid="x")))
    for call in calls:
        with pytest.raises(aio.AioRpcError) as caught:
            await call
        assert error_info(caught.value).reason == "FIELD_INVALID"


async def test_a_question_too_long(client: Client, tenant: str) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await client.query(client.ref(tenant, MEMORY, 1), "word " * 2000).read()
    info = error_info(caught.value)
    assert info.reason == "QUESTION_TOO_LONG"
    assert info.metadata == {"limit": "1024", "actual": "2000"}


async def test_eviction_and_deletion(client: Client, tenant: str) -> None:
    before = (await client.quiet()).routing_bytes
    await client.fill(tenant, MEMORY, TEXTS)
    ref = client.ref(tenant, MEMORY, 3)
    await client.answer(ref, CHESS)
    evict = pb.EvictRequest(tenant=tenant, memory_uid=MEMORY)
    assert (await client.stub.Evict(evict)).freed_bytes > 0
    assert (await client.quiet()).routing_bytes == before
    assert (await client.stub.Evict(evict)).freed_bytes == 0
    assert await client.answer(ref, CHESS) == (TEXTS[1], [2])
    client.store(tenant).delete_documents(MemoryUid(bytes.fromhex(MEMORY)), [2])
    deleted = client.ref(tenant, MEMORY, 3, epoch=1)
    assert await client.answer(deleted, CHESS) == (NOTHING_FOUND, [])
    assert (await client.stub.Evict(pb.EvictRequest(tenant=tenant))).freed_bytes > 0
    await client.answer(deleted, CHESS)
    assert (await client.stub.Evict(pb.EvictRequest())).freed_bytes > 0
    assert (await client.quiet()).resident_memories == 0


async def test_a_corrupt_block_is_named(client: Client, tenant: str) -> None:
    await client.fill(tenant, MEMORY, TEXTS)
    uid = MemoryUid(bytes.fromhex(MEMORY))
    record = block_key(uid, Kind.CONTENT, client.encoding, 2)
    client.close()
    with (
        lmdb.open(str(client.data.tenant(tenant)), map_size=2**26) as environment,
        environment.begin(write=True) as transaction,
    ):
        value = bytearray(transaction.get(record) or b"")
        value[-1] ^= 1
        transaction.put(record, bytes(value))
    ref = client.ref(tenant, MEMORY, 3)
    with pytest.raises(aio.AioRpcError) as caught:
        await client.answer(ref, CHESS)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    info = error_info(caught.value)
    assert (info.reason, info.metadata["number"]) == ("RECORD_CORRUPT", "2")
    await client.fill(tenant, MEMORY, TEXTS)  # As memsvc does: from text, again.
    assert await client.answer(ref, CHESS) == (TEXTS[1], [2])


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A step takes 20 ms. Little room, so that memories come and go."""
    folder = tmp_path_factory.mktemp("slow")
    running = WorkerProcess(
        folder, "fake:step_ms=20", "--routing-budget=200K", "--content-budget=20K"
    )
    yield running
    running.stop()


async def test_cancelling_and_deadlines_stop_the_work(slow: WorkerProcess) -> None:
    async with connected(slow) as client:
        tenant = "0a" * 16
        await client.fill(tenant, MEMORY, ["boat " * 250])
        ref = client.ref(tenant, MEMORY, 1)
        call = client.query(ref, BOAT)
        assert [await call.read() for _ in range(4)]
        call.cancel()
        late = client.query(ref, BOAT, timeout=0.2)
        with pytest.raises(aio.AioRpcError) as caught:
            async for _ in late:
                pass
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        started = asyncio.get_running_loop().time()
        await client.quiet()
        assert asyncio.get_running_loop().time() - started < 0.5, "250 steps take 5 s"
        encoding = client.encode(tenant, MEMORY, [(n, "text") for n in range(1, 257)])
        await encoding.read()
        encoding.cancel()
        evict = pb.EvictRequest(tenant=tenant)
        await client.stub.Evict(evict, timeout=2)


async def test_eviction_ends_running_queries(slow: WorkerProcess) -> None:
    async with connected(slow) as client:
        tenant = "0b" * 16
        await client.fill(tenant, MEMORY, ["boat " * 250])
        call = client.query(client.ref(tenant, MEMORY, 1), BOAT)
        assert [await call.read() for _ in range(4)]
        evict = pb.EvictRequest(tenant=tenant, memory_uid=MEMORY)
        before = (await client.stub.GetInfo(pb.GetInfoRequest())).residency
        assert before.running_queries == 1
        freed = (await client.stub.Evict(evict, timeout=2)).freed_bytes
        after = await client.quiet()
        assert freed > 0
        assert freed == _held(before) - _held(after)
        with pytest.raises(aio.AioRpcError) as caught:
            await rest(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error_info(caught.value).reason == "WORKER_UNAVAILABLE"


def _held(residency: pb.ResidencyInfo) -> int:
    return residency.routing_bytes + residency.content_bytes


async def test_overload_is_refused_with_a_hint_and_the_rest_is_served(slow: WorkerProcess) -> None:
    async with connected(slow) as client:
        tenant = "0c" * 16
        await client.fill(tenant, MEMORY, TEXTS)
        ref = client.ref(tenant, MEMORY, 3)
        answers = await asyncio.gather(
            *(client.answer(ref, CHESS) for _ in range(120)), return_exceptions=True
        )
        served = [answer for answer in answers if answer == (TEXTS[1], [2])]
        refused = [answer for answer in answers if isinstance(answer, aio.AioRpcError)]
        assert len(served) + len(refused) == 120
        # Of the 64 waiting places one tenant gets four fifths: the rest is kept for others.
        assert len(served) >= 64 * 4 // 5
        assert refused
        for error in refused:
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error_info(error).reason == "OVERLOADED"
            assert has_retry_info(error)


async def test_many_memories_in_little_room(slow: WorkerProcess) -> None:
    """Twelve memories, room for a few, queries and evictions at once: every answer is right."""
    async with connected(slow) as client:
        tenants = ["1a" * 16, "1b" * 16]
        memories = [f"{n:032x}" for n in range(6)]
        for tenant in tenants:
            for memory in memories:
                extra = [f"filler number {n} {memory[-2:]}" for n in range(20)]
                await client.fill(tenant, memory, [*extra, f"boat of {tenant} {memory}"])

        async def ask(turn: int) -> None:
            tenant, memory = tenants[turn % 2], memories[turn % 6]
            if turn % 13 == 12:
                await client.stub.Evict(pb.EvictRequest(tenant=tenant, memory_uid=memory))
                return
            try:
                text, cited = await client.answer(client.ref(tenant, memory, 21), BOAT)
            except aio.AioRpcError as error:
                assert error_info(error).reason == "WORKER_UNAVAILABLE"  # It was evicted.
            else:
                assert (text, cited) == (f"boat of {tenant} {memory}", [21])

        await asyncio.gather(*(ask(turn) for turn in range(60)))
        held = await client.quiet()
        assert held.routing_bytes <= 200 * 1024
        assert held.content_bytes <= 20 * 1024
