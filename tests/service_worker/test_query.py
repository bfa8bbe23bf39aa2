"""Questions through the whole service, with the fake engine in a worker process."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, cast

import pytest

from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually
from tests.support.served import Caller, Refusal, refused

CAT = "My cat is called Mittens"
BOILER = "Olga repaired the boiler on Tuesday"

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_answer_is_streamed_with_its_citation(shared: Asking) -> None:
    memory = await shared.create("pets")
    written = await shared.append(memory.name, CAT, BOILER)
    answer = await shared.ask(memory.name, "Who repaired the boiler?")
    assert "Olga" in answer.text
    assert answer.cited == [2]
    (citation,) = answer.citations
    assert citation.document == written.documents[1]
    assert citation.content.conversation.turns[0].text == BOILER
    assert citation.content.revision == written.revision
    (routing,) = answer.routings
    assert routing.documents[0].document == written.documents[1]
    assert routing.documents[0].layers[0].rank == 1
    assert answer.usage is not None
    assert answer.usage.question_tokens == 4
    assert answer.usage.routed_documents == 2
    assert answer.usage.total_ms > 0
    assert answer.done == pb.Done(
        reason=pb.Done.STOP, revision=written.revision, model="models/fake"
    )


async def test_words_can_be_given_a_share(shared: Asking) -> None:
    memory = await shared.create()
    written = await shared.append(memory.name, CAT, BOILER, "The boiler is in the cellar")
    question = "Who repaired the boiler?"

    async def retrieve(share: float | None) -> pb.RetrieveResponse:
        request = pb.RetrieveRequest(memory=memory.name, question=question, lexical_weight=share)
        return cast(
            pb.RetrieveResponse,
            await shared.as_operator(shared.memories.Retrieve, request),
        )

    alone, half = await retrieve(None), await retrieve(0.5)
    assert alone.lexical_weight == 0 and half.lexical_weight == 0.5
    assert [d.lexical_score for d in alone.documents] == [0] * len(alone.documents)
    assert [d.number for d in half.documents] == [2, 3]
    assert half.documents[0].lexical_score > half.documents[1].lexical_score > 0
    assert half.documents[0].routing_score == alone.documents[0].routing_score
    options = pb.GenerationOptions(lexical_weight=0.5)
    answer = await shared.ask(memory.name, question, options=options)
    assert answer.routings[0].lexical_weight == 0.5
    assert answer.cited == [2]
    assert answer.usage is not None and answer.usage.lexical_ms > 0
    await shared.as_operator(
        shared.memories.DeleteDocuments,
        pb.DeleteDocumentsRequest(parent=memory.name, names=[written.documents[1]]),
    )
    assert [d.number for d in (await retrieve(1)).documents] == [3]


async def test_a_share_out_of_range_is_refused(shared: Asking) -> None:
    memory = await shared.create()
    for share in (-0.1, 1.1, math.nan):
        request: dict[str, Any] = {"memory": memory.name, "question": "Which cat?"}
        options = pb.GenerationOptions(lexical_weight=share)
        asked = pb.QueryRequest(**request, options=options)
        found = await refused(shared.as_operator(shared.memories.Query, asked))
        assert (found.reason, found.field) == ("FIELD_INVALID", "options.lexical_weight")
        ranked = pb.RetrieveRequest(**request, lexical_weight=share)
        found = await refused(shared.as_operator(shared.memories.Retrieve, ranked))
        assert (found.reason, found.field) == ("FIELD_INVALID", "lexical_weight")


async def test_an_empty_memory_answers(shared: Asking) -> None:
    memory = await shared.create()
    answer = await shared.ask(memory.name, "Anything there?")
    assert answer.text == "I found nothing about that."
    assert answer.done is not None and answer.done.revision == 0


async def test_queries_are_counted(start: Serve) -> None:
    async with start() as served:
        memory = await served.create()
        await served.append(memory.name, CAT)
        answer = await served.ask(memory.name, "Which cat?")
        tenant = await served.app.catalog.get_tenant("default")
        usage = await eventually(lambda: _counted(served, tenant.uid))
        assert answer.usage is not None
        assert usage.question_tokens == answer.usage.question_tokens
        assert usage.answer_tokens == answer.usage.answer_tokens
        assert usage.encoded_tokens == 6
        assert usage.queries == 1


async def _counted(served: Asking, tenant_uid: str) -> object:
    usage = await served.app.catalog.usage(tenant_uid)
    return usage if usage.queries and usage.encoded_tokens else None


async def test_options_reach_the_engine(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, BOILER, "The boiler is in the cellar")
    answer = await shared.ask(
        memory.name,
        "boiler",
        options=pb.GenerationOptions(max_answer_tokens=2, max_rounds=2, top_k=1),
    )
    assert len(answer.text.split()) == 2
    assert answer.done is not None and answer.done.reason == pb.Done.LENGTH
    assert len(answer.routings) == 2
    assert [len(routing.documents) for routing in answer.routings] == [1, 1]
    assert sorted(answer.cited) == [1, 2]


BAD_QUESTIONS: tuple[tuple[dict[str, Any], str, str], ...] = (
    ({"question": ""}, "FIELD_REQUIRED", "question"),
    ({"question": "a\x07b"}, "TEXT_NOT_CLEAN", "question"),
    ({"question": "x" * 16_385}, "TEXT_TOO_LONG", "question"),
    ({"question": "why " * 2_000}, "QUESTION_TOO_LONG", "question"),
    ({"memory": "memories/absent-one"}, "MEMORY_NOT_FOUND", "memory"),
    ({"memory": "documents/1"}, "FIELD_INVALID", "memory"),
    ({"model": "models/absent"}, "MODEL_NOT_FOUND", "model"),
    ({"model": "absent"}, "FIELD_INVALID", "model"),
    ({"at_least_revision": -1}, "FIELD_INVALID", "at_least_revision"),
    ({"at_least_revision": 2}, "REVISION_NOT_REACHED", "at_least_revision"),
)


async def test_a_bad_question_is_refused(shared: Asking) -> None:
    memory = await shared.create("mine")
    await shared.append(memory.name, CAT)
    for fields, reason, field in BAD_QUESTIONS:
        request = {"memory": memory.name, "question": "Which cat?", **fields}
        for call in (
            shared.as_operator(shared.memories.Query, pb.QueryRequest(**request)),
            shared.as_operator(shared.memories.Retrieve, pb.RetrieveRequest(**request)),
        ):
            found = await refused(call)
            assert (found.reason, found.field) == (reason, field)


BAD_OPTIONS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"top_k": 65}, "options.top_k"),
    ({"top_k": -1}, "options.top_k"),
    ({"temperature": 2.5}, "options.temperature"),
    ({"temperature": float("nan")}, "options.temperature"),
    ({"top_p": 1.5}, "options.top_p"),
    ({"max_rounds": 17}, "options.max_rounds"),
    ({"max_answer_tokens": 257}, "options.max_answer_tokens"),
    ({"max_answer_tokens": -1}, "options.max_answer_tokens"),
)


async def test_bad_options_are_refused(shared: Asking) -> None:
    memory = await shared.create()
    for options, field in BAD_OPTIONS:
        call = shared.stream(memory.name, "Which?", options=pb.GenerationOptions(**options))
        found = await refused(call)
        assert (found.reason, found.field) == ("FIELD_INVALID", field)


async def test_retrieve_ranks_and_shows_what_the_view_asks(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, CAT, BOILER, "The boiler is old and the boiler leaks")
    full = await _retrieve(shared, memory.name, limit=2)
    assert {ranked.number for ranked in full.documents} == {2, 3}
    assert full.documents[0].score >= full.documents[1].score
    assert full.documents[0].content.conversation.turns
    assert full.revision == 1 and full.model == "models/fake"
    basic = await _retrieve(shared, memory.name, view=resources.BASIC)
    assert all(not r.content.HasField("conversation") for r in basic.documents)
    assert basic.documents[0].content.text_bytes > 0
    for limit in (-1, 101):
        found = await refused(_retrieve_call(shared, memory.name, limit=limit))
        assert (found.reason, found.field) == ("FIELD_INVALID", "limit")


async def _retrieve(served: Asking, memory: str, **fields: Any) -> pb.RetrieveResponse:
    reply: pb.RetrieveResponse = await _retrieve_call(served, memory, **fields)
    return reply


def _retrieve_call(served: Asking, memory: str, **fields: Any) -> Any:
    request = pb.RetrieveRequest(memory=memory, question="boiler", **fields)
    return served.as_operator(served.memories.Retrieve, request)


async def test_every_append_that_returned_is_seen(start: Serve) -> None:
    """Read your writes, while another memory keeps the worker busy."""
    async with start(worker_model="fake:encode_ms=2") as served:
        busy, memory = await served.create(), await served.create()
        loads = [
            asyncio.create_task(served.append(busy.name, *(f"load {i} {j}" for j in range(200))))
            for i in range(3)
        ]
        for number in range(8):
            written = await served.append(
                memory.name, f"The codeword of day{number} is word{number}"
            )
            answer = await served.ask(
                memory.name, f"codeword of day{number}?", at_least_revision=written.revision
            )
            assert f"word{number}" in answer.text
            assert answer.done is not None and answer.done.revision >= written.revision
        await asyncio.gather(*loads)


async def test_a_deadline_before_encoding_says_how_far_it_is(start: Serve) -> None:
    async with start(worker_model="fake:encode_ms=400") as served:
        memory = await served.create()
        await served.append(memory.name, CAT)
        await served.ready(memory.name)
        await served.append(memory.name, *(f"slow {i}" for i in range(9)))
        began = time.monotonic()
        found = await refused(served.stream(memory.name, "Which?", timeout=2.5))
        assert time.monotonic() - began < 2.5
        assert (found.code, found.reason) == ("DEADLINE_EXCEEDED", "ENCODING_NOT_READY")
        assert found.metadata == {
            "model": "fake",
            "revision": "2",
            "encoded_revision": "1",
            "encoded_documents": "1",
            "documents": "10",
        }
        assert found.retry_s is not None


async def test_a_query_without_deadline_waits_as_long_as_the_server_says(start: Serve) -> None:
    async with start(worker_model="fake:encode_ms=400", query_wait_s=0.5) as served:
        memory = await served.create()
        await served.worker_pid()
        await served.append(memory.name, *(f"slow {i}" for i in range(4)))
        found = await refused(served.stream(memory.name, "Which?", timeout=None))
        assert found.reason == "ENCODING_NOT_READY"


async def test_a_cancelled_query_stops_the_worker(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=50") as served:
        memory = await served.create()
        await served.append(memory.name, "boiler " + "word " * 200)
        call = served.stream(memory.name, "boiler?")
        async for event in call:
            if event.WhichOneof("event") == "text":
                break
        call.cancel()
        model = served.app.workers.find("fake")
        assert model is not None

        async def idle() -> bool:
            info = await model.client.info(5.0)
            return info.residency.running_queries == 0

        await eventually(idle, 3.0)
        tenant = await served.app.catalog.get_tenant("default")
        assert (await served.app.catalog.usage(tenant.uid)).queries == 1


async def test_revoking_a_key_ends_its_answer_and_stops_the_worker(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=50") as served:
        memory = await served.create()
        await served.append(memory.name, "boiler " + "word " * 200)
        made = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/default", api_key=admin.ApiKey(scope=admin.READ)
            ),
        )
        question = pb.QueryRequest(memory=memory.name, question="boiler?")
        events = aiter(Caller(made.secret)(served.memories.Query, question))
        while (await anext(events)).WhichOneof("event") != "text":
            pass
        await served.as_operator(
            served.admin.RevokeApiKey, admin.RevokeApiKeyRequest(name=made.api_key.name)
        )
        async with asyncio.timeout(3):
            ended = await refused(events)
        assert (ended.code, ended.reason) == ("UNAUTHENTICATED", "CREDENTIAL_INVALID")
        model = served.app.workers.find("fake")
        assert model is not None

        async def idle() -> bool:
            info = await model.client.info(5.0)
            return info.residency.running_queries == 0

        await eventually(idle, 3.0)


async def test_deleted_documents_are_gone_from_answers(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, BOILER, "Igor repaired the boiler in May")
    assert (await shared.ask(memory.name, BOILER)).cited == [1]
    await shared.delete_documents(memory.name, 1)
    answer = await shared.ask(memory.name, BOILER)
    assert answer.cited == [2] and "Olga" not in answer.text
    retrieved = await _retrieve(shared, memory.name)
    assert [ranked.number for ranked in retrieved.documents] == [2]


async def test_a_deletion_ends_running_queries(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=40") as served:
        memory = await served.create()
        await served.append(memory.name, "boiler " + "word " * 200)
        call = served.stream(memory.name, "boiler?")
        async for event in call:
            if event.WhichOneof("event") == "text":
                break
        began = time.monotonic()
        await served.delete(memory.name)
        found = await refused(call)
        assert time.monotonic() - began < 5
        assert found.reason == "MEMORY_NOT_FOUND"
        assert (await refused(served.stream(memory.name, "boiler?"))).reason == "MEMORY_NOT_FOUND"


async def test_tenants_cannot_ask_each_other(shared: Asking) -> None:
    from memsvc.v1 import admin_service_pb2 as admin

    memory = await shared.create("private")
    await shared.append(memory.name, CAT)
    await shared.as_operator(
        shared.admin.CreateTenant, admin.CreateTenantRequest(tenant_id="other")
    )
    made = await shared.as_operator(
        shared.admin.CreateApiKey,
        admin.CreateApiKeyRequest(parent="tenants/other", api_key=admin.ApiKey(scope=admin.ADMIN)),
    )
    metadata = (("authorization", f"Bearer {made.secret}"),)
    calls = [
        shared.memories.Query(
            pb.QueryRequest(memory=memory.name, question="cat"), metadata=metadata
        ),
        shared.memories.Retrieve(
            pb.RetrieveRequest(memory=memory.name, question="cat"), metadata=metadata
        ),
        shared.memories.WatchMemory(pb.WatchMemoryRequest(name=memory.name), metadata=metadata),
        shared.memories.ExportMemory(pb.ExportMemoryRequest(name=memory.name), metadata=metadata),
    ]
    answers: list[Refusal] = [await refused(call) for call in calls]
    assert {answer.reason for answer in answers} == {"MEMORY_NOT_FOUND"}


async def test_the_latest_of_what_is_said_twice_comes_first(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "my favourite restaurant in town is the golden lion")
    await shared.append(memory.name, "the dentist moved our appointment to november")
    await shared.append(memory.name, "my favourite restaurant in town is now the blue anchor")
    question = "what is my favourite restaurant, the golden lion?"

    async def first(**fields: Any) -> int:
        request = pb.RetrieveRequest(memory=memory.name, question=question, **fields)
        reply = await shared.as_operator(shared.memories.Retrieve, request)
        return int(reply.documents[0].number)

    assert await first() == 1
    assert await first(prefer_latest=True) == 3
    assert (await shared.ask(memory.name, question)).cited == [1]
    options = pb.GenerationOptions(prefer_latest=True)
    assert (await shared.ask(memory.name, question, options=options)).cited == [3]
