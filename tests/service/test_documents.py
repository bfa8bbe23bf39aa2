from __future__ import annotations

import asyncio

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.served import Serve, Served, names_of, refused, turns


async def test_what_was_appended_is_read_back(served: Served) -> None:
    memory = await served.create("diary")
    said = resources.Turn(
        role=resources.ASSISTANT,
        text="Schöne Grüße\n\tund e\u0301",
        occurred_at=Timestamp(seconds=1_700_000_000, nanos=123_456_000),
        speaker="Bob",
        session="s1",
        metadata={"source": "chat"},
    )
    request = pb.AppendTurnsRequest(memory=memory.name, turns=[*turns("hello"), said])
    reply = await served.as_operator(served.memories.AppendTurns, request)
    assert reply.revision == 1
    assert list(reply.documents) == [f"{memory.name}/documents/{n}" for n in (1, 2)]
    document = await served.as_operator(
        served.memories.GetDocument, pb.GetDocumentRequest(name=reply.documents[1])
    )
    assert document.conversation.turns == [said]
    assert (document.number, document.revision) == (2, 1)
    assert document.text_bytes == len(said.text.encode())
    basic = await served.as_operator(
        served.memories.GetDocument,
        pb.GetDocumentRequest(name=reply.documents[1], view=resources.BASIC),
    )
    assert basic.WhichOneof("source") is None
    assert basic.text_bytes == document.text_bytes
    got = await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))
    assert (got.revision, got.document_count) == (1, 2)
    assert got.text_bytes == len("hello") + document.text_bytes


async def test_packing_is_the_memorys_own(served: Served) -> None:
    window = resources.PackingPolicy(mode=resources.PackingPolicy.WINDOW, window_turns=2)
    memory = await served.create("windowed", packing=window)
    reply = await served.append(memory.name, "a", "b", "c")
    assert len(reply.documents) == 2
    assert await served.texts(memory.name) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("request_", "code", "reason", "field"),
    [
        (pb.AppendTurnsRequest(turns=turns("x")), "INVALID_ARGUMENT", "FIELD_REQUIRED", "memory"),
        (
            pb.AppendTurnsRequest(memory="nonsense", turns=turns("x")),
            "INVALID_ARGUMENT",
            "FIELD_INVALID",
            "memory",
        ),
        (
            pb.AppendTurnsRequest(memory="memories/absent", turns=turns("x")),
            "NOT_FOUND",
            "MEMORY_NOT_FOUND",
            "memory",
        ),
        (
            pb.AppendTurnsRequest(memory="memories/here"),
            "INVALID_ARGUMENT",
            "FIELD_REQUIRED",
            "turns",
        ),
        (
            pb.AppendTurnsRequest(memory="memories/here", turns=turns(*["x"] * 1001)),
            "INVALID_ARGUMENT",
            "TOO_MANY_ITEMS",
            "turns",
        ),
        (
            pb.AppendTurnsRequest(memory="memories/here", turns=turns("ok", "bell\x07")),
            "INVALID_ARGUMENT",
            "TEXT_NOT_CLEAN",
            "turns[1].text",
        ),
        (
            pb.AppendTurnsRequest(memory="memories/here", turns=turns("x"), request_id="ä"),
            "INVALID_ARGUMENT",
            "FIELD_INVALID",
            "request_id",
        ),
    ],
)
async def test_bad_appends_write_nothing(
    served: Served, request_: pb.AppendTurnsRequest, code: str, reason: str, field: str
) -> None:
    await served.create("here")
    refusal = await refused(served.as_operator(served.memories.AppendTurns, request_))
    assert (refusal.code, refusal.reason, refusal.field) == (code, reason, field)
    assert refusal.retry_s is None
    assert await served.texts("memories/here") == []


async def test_concurrent_appends_give_gap_free_ascending_numbers(served: Served) -> None:
    memory = await served.create("busy")
    replies = await asyncio.gather(
        *(served.append(memory.name, f"{index}-a", f"{index}-b") for index in range(20))
    )
    replies.sort(key=lambda reply: reply.revision)
    assert [reply.revision for reply in replies] == list(range(1, 21))
    numbers = [int(name.rsplit("/", 1)[1]) for reply in replies for name in reply.documents]
    assert numbers == list(range(1, 41))
    texts = await served.texts(memory.name)
    assert sorted(texts) == sorted(f"{i}-{half}" for i in range(20) for half in "ab")
    # The two turns of one call lie side by side.
    assert all(a[:-2] == b[:-2] for a, b in zip(texts[::2], texts[1::2], strict=True))


async def test_a_repeated_request_id_appends_once(served: Served) -> None:
    memory = await served.create("retried")
    replies = await asyncio.gather(
        *(served.append(memory.name, "only once", request_id="r-1") for _ in range(10))
    )
    assert all(reply == replies[0] for reply in replies)
    await served.append(memory.name, "another")
    assert await served.append(memory.name, "only once", request_id="r-1") == replies[0]
    assert await served.texts(memory.name) == ["only once", "another"]
    refusal = await refused(served.append(memory.name, "other payload", request_id="r-1"))
    assert (refusal.code, refusal.reason, refusal.field) == (
        "ALREADY_EXISTS",
        "REQUEST_ID_REUSED",
        "request_id",
    )
    other = await served.create("elsewhere")
    refusal = await refused(served.append(other.name, "only once", request_id="r-1"))
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_a_request_id_used_by_another_call_is_refused(served: Served) -> None:
    memory = await served.create("mixed")
    await served.append(memory.name, "x", request_id="shared")
    delete = pb.DeleteDocumentsRequest(
        parent=memory.name, names=[f"{memory.name}/documents/1"], request_id="shared"
    )
    refusal = await refused(served.as_operator(served.memories.DeleteDocuments, delete))
    assert refusal.reason == "REQUEST_ID_REUSED"
    assert await served.texts(memory.name) == ["x"]


async def test_paging_documents(served: Served) -> None:
    memory = await served.create("paged")
    await served.append(memory.name, *(str(index) for index in range(7)))
    numbers: list[int] = []
    token = ""
    while True:
        page = await served.as_operator(
            served.memories.ListDocuments,
            pb.ListDocumentsRequest(parent=memory.name, page_size=3, page_token=token),
        )
        assert all(document.WhichOneof("source") is None for document in page.documents)
        numbers += [document.number for document in page.documents]
        token = page.next_page_token
        if not token:
            break
        assert len(page.documents) == 3
    assert numbers == list(range(1, 8))


async def test_a_token_is_good_for_its_memory_only(served: Served) -> None:
    for name in ("first", "second"):
        memory = await served.create(name)
        await served.append(memory.name, "a", "b")
    page = await served.as_operator(
        served.memories.ListDocuments,
        pb.ListDocumentsRequest(parent="memories/first", page_size=1),
    )
    refusal = await refused(
        served.as_operator(
            served.memories.ListDocuments,
            pb.ListDocumentsRequest(parent="memories/second", page_token=page.next_page_token),
        )
    )
    assert refusal.reason == "PAGE_TOKEN_INVALID"


async def test_pages_of_large_documents_stay_small(served: Served) -> None:
    memory = await served.create("large")
    for letter in "abc":
        await served.append(memory.name, *[letter * 262_144] * 3)
    request = pb.ListDocumentsRequest(parent=memory.name, page_size=100, view=resources.FULL)
    page = await served.as_operator(served.memories.ListDocuments, request)
    assert 1 <= len(page.documents) < 9
    assert page.ByteSize() < 2 * 1024 * 1024
    texts = await served.texts(memory.name)
    assert texts == [letter * 262_144 for letter in "aaabbbccc"]


@pytest.mark.parametrize(
    ("page_size", "view", "field"),
    [(101, resources.FULL, "page_size"), (1001, resources.BASIC, "page_size"), (1, 9, "view")],
)
async def test_bad_listings(served: Served, page_size: int, view: int, field: str) -> None:
    await served.create("here")
    request = pb.ListDocumentsRequest(parent="memories/here", page_size=page_size, view=view)  # type: ignore[arg-type]  # unknown views are the point
    refusal = await refused(served.as_operator(served.memories.ListDocuments, request))
    assert (refusal.reason, refusal.field) == ("FIELD_INVALID", field)


async def test_documents_that_are_not_there(served: Served) -> None:
    memory = await served.create("sparse")
    for name, reason in (
        (f"{memory.name}/documents/1", "DOCUMENT_NOT_FOUND"),
        (f"{memory.name}/documents/9223372036854775807", "DOCUMENT_NOT_FOUND"),
        ("memories/absent/documents/1", "MEMORY_NOT_FOUND"),
        (f"{memory.name}/documents/zero", "FIELD_INVALID"),
    ):
        refusal = await refused(
            served.as_operator(served.memories.GetDocument, pb.GetDocumentRequest(name=name))
        )
        assert (refusal.reason, refusal.field) == (reason, "name")


async def delete(served: Served, *names: str, request_id: str = "") -> int:
    parent = names[0].rsplit("/", 2)[0]
    request = pb.DeleteDocumentsRequest(parent=parent, names=names, request_id=request_id)
    reply = await served.as_operator(served.memories.DeleteDocuments, request)
    revision: int = reply.revision
    return revision


async def test_deleted_documents_are_gone_and_numbers_are_not_reused(served: Served) -> None:
    memory = await served.create("pruned")
    first = await served.append(memory.name, "a", "b", "c")
    assert await delete(served, first.documents[0], first.documents[2]) == 2
    assert await served.texts(memory.name) == ["b"]
    refusal = await refused(
        served.as_operator(
            served.memories.GetDocument, pb.GetDocumentRequest(name=first.documents[0])
        )
    )
    assert refusal.reason == "DOCUMENT_NOT_FOUND"
    after = await served.append(memory.name, "d")
    assert (after.revision, list(after.documents)) == (3, [f"{memory.name}/documents/4"])
    got = await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))
    assert (got.document_count, got.text_bytes) == (2, 2)
    app = served.server.application
    row = await app.catalog.get_memory_by_uid(got.uid)
    from memsvc.writes import memory_uid

    stored = await app.stores.read(
        row.tenant_uid, lambda store: store.document_numbers(memory_uid(row))
    )
    assert stored == [2, 4]


async def test_deleting_is_all_or_none(served: Served) -> None:
    memory = await served.create("whole")
    reply = await served.append(memory.name, "a", "b")
    absent = f"{memory.name}/documents/9"
    refusal = await refused(delete(served, reply.documents[0], absent))
    assert (refusal.code, refusal.reason, refusal.field) == (
        "NOT_FOUND",
        "DOCUMENT_NOT_FOUND",
        "names[1]",
    )
    assert await served.texts(memory.name) == ["a", "b"]
    refusal = await refused(delete(served, reply.documents[0], reply.documents[0]))
    assert (refusal.reason, refusal.field) == ("FIELD_INVALID", "names[1]")
    refusal = await refused(
        served.as_operator(
            served.memories.DeleteDocuments,
            pb.DeleteDocumentsRequest(parent=memory.name, names=["memories/other/documents/1"]),
        )
    )
    assert (refusal.reason, refusal.field) == ("FIELD_INVALID", "names[0]")
    refusal = await refused(
        served.as_operator(
            served.memories.DeleteDocuments, pb.DeleteDocumentsRequest(parent=memory.name)
        )
    )
    assert (refusal.reason, refusal.field) == ("FIELD_REQUIRED", "names")


async def test_deleting_twice_with_one_request_id_is_one_deletion(served: Served) -> None:
    memory = await served.create("once")
    reply = await served.append(memory.name, "a", "b")
    revisions = await asyncio.gather(
        *(delete(served, reply.documents[0], request_id="d-1") for _ in range(5))
    )
    assert set(revisions) == {2}
    refusal = await refused(delete(served, reply.documents[0]))
    assert refusal.reason == "DOCUMENT_NOT_FOUND"


async def test_quotas_of_a_memory(start: Serve) -> None:
    async with start(max_documents_per_memory=3, max_text_bytes_per_memory=10) as served:
        memory = await served.create("small")
        await served.append(memory.name, "a", "b")
        refusal = await refused(served.append(memory.name, "c", "d"))
        assert (refusal.reason, refusal.metadata["quota"]) == (
            "QUOTA_EXCEEDED",
            "max_documents_per_memory",
        )
        refusal = await refused(served.append(memory.name, "x" * 9))
        assert refusal.metadata == {"quota": "max_text_bytes_per_memory", "limit": "10"}
        assert await served.texts(memory.name) == ["a", "b"]


async def test_everything_survives_a_restart(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("lasting", display_name="kept")
        await served.append(memory.name, "first", request_id="r-1")
    async with start() as served:
        reply = await served.append(memory.name, "first", request_id="r-1")
        assert reply.revision == 1
        assert (await served.append(memory.name, "second")).revision == 2
        assert await served.texts(memory.name) == ["first", "second"]
        page = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
        assert names_of(page.memories) == [memory.name]
