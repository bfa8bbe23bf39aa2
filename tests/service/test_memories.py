from __future__ import annotations

import asyncio

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.cuts import cut_at_commit
from tests.support.served import Serve, Served, names_of, refused


async def test_a_memory_is_created_as_asked(served: Served) -> None:
    memory = await served.create(
        "alice-notes", display_name="Alice's notes", labels={"app": "chat", "tier": "gold"}
    )
    assert memory.name == "memories/alice-notes"
    assert len(bytes.fromhex(memory.uid)) == 16
    assert (memory.revision, memory.document_count, memory.text_bytes) == (0, 0, 0)
    assert memory.state == resources.Memory.ACTIVE
    assert memory.packing.mode == resources.PackingPolicy.TURN
    assert dict(memory.labels) == {"app": "chat", "tier": "gold"}
    assert memory.create_time.seconds > 1_600_000_000
    got = await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))
    assert got == memory


async def test_the_server_makes_an_id_when_none_is_chosen(served: Served) -> None:
    first, second = await served.create(), await served.create()
    assert first.name != second.name
    assert first.uid != second.uid


async def test_a_taken_id_is_refused(served: Served) -> None:
    await served.create("taken")
    refusal = await refused(served.create("taken"))
    assert (refusal.code, refusal.reason, refusal.field) == (
        "ALREADY_EXISTS",
        "ALREADY_EXISTS",
        "memory_id",
    )


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.CreateMemoryRequest(memory_id="Bad"), "FIELD_INVALID", "memory_id"),
        (pb.CreateMemoryRequest(request_id="a b"), "FIELD_INVALID", "request_id"),
        (
            pb.CreateMemoryRequest(memory=resources.Memory(display_name="x" * 257)),
            "TEXT_TOO_LONG",
            "memory.display_name",
        ),
        (
            pb.CreateMemoryRequest(memory=resources.Memory(labels={"Bad key": ""})),
            "FIELD_INVALID",
            "memory.labels",
        ),
        (
            pb.CreateMemoryRequest(
                memory=resources.Memory(labels={f"k{i}": "" for i in range(65)})
            ),
            "TOO_MANY_ITEMS",
            "memory.labels",
        ),
    ],
)
async def test_bad_memories_are_refused(
    served: Served, request_: pb.CreateMemoryRequest, reason: str, field: str
) -> None:
    refusal = await refused(served.as_operator(served.memories.CreateMemory, request_))
    assert (refusal.code, refusal.reason, refusal.field) == ("INVALID_ARGUMENT", reason, field)
    page = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
    assert not page.memories


async def test_creating_twice_with_one_request_id_gives_one_memory(served: Served) -> None:
    request = pb.CreateMemoryRequest(
        memory=resources.Memory(display_name="once"), request_id="create-1"
    )
    replies = await asyncio.gather(
        *(served.as_operator(served.memories.CreateMemory, request) for _ in range(8))
    )
    assert all(reply == replies[0] for reply in replies)
    page = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
    assert names_of(page.memories) == [replies[0].name]
    other = pb.CreateMemoryRequest(
        memory=resources.Memory(display_name="twice"), request_id="create-1"
    )
    refusal = await refused(served.as_operator(served.memories.CreateMemory, other))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


async def test_paging_through_all_newest_first(served: Served) -> None:
    made = [(await served.create(f"memory-{index}")).name for index in range(7)]
    seen: list[str] = []
    token = ""
    for _ in range(4):
        page = await served.as_operator(
            served.memories.ListMemories, pb.ListMemoriesRequest(page_size=2, page_token=token)
        )
        seen += names_of(page.memories)
        token = page.next_page_token
    assert not token
    assert seen == list(reversed(made))


async def test_bad_pages(served: Served) -> None:
    for index in range(3):
        await served.create(f"memory-{index}")
    page = await served.as_operator(
        served.memories.ListMemories, pb.ListMemoriesRequest(page_size=1)
    )
    token = page.next_page_token
    other = "B" if token[0] == "A" else "A"
    for bad in (token[:-4] + "AAAA", other + token[1:], "x", token + "AAAA", "ü"):
        refusal = await refused(
            served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest(page_token=bad))
        )
        assert (refusal.reason, refusal.field) == ("PAGE_TOKEN_INVALID", "page_token")
    elsewhere = pb.ListDocumentsRequest(parent="memories/memory-0", page_token=token)
    refusal = await refused(served.as_operator(served.memories.ListDocuments, elsewhere))
    assert refusal.reason == "PAGE_TOKEN_INVALID"
    for size in (-1, 1001):
        refusal = await refused(
            served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest(page_size=size))
        )
        assert (refusal.reason, refusal.field) == ("FIELD_INVALID", "page_size")


async def test_update_follows_the_mask(served: Served) -> None:
    memory = await served.create("masked", display_name="old", labels={"a": "1"})

    async def update(paths: list[str], **fields: object) -> resources.Memory:
        wanted = resources.Memory(name=memory.name, **fields)  # type: ignore[arg-type]  # by name
        mask = FieldMask(paths=paths) if paths else None
        reply: resources.Memory = await served.as_operator(
            served.memories.UpdateMemory,
            pb.UpdateMemoryRequest(memory=wanted, update_mask=mask),
        )
        return reply

    changed = await update(["display_name"], display_name="new", labels={"b": "2"})
    assert (changed.display_name, dict(changed.labels)) == ("new", {"a": "1"})
    assert changed.etag != memory.etag
    cleared = await update(["labels"])
    assert (cleared.display_name, dict(cleared.labels)) == ("new", {})
    implied = await update([], labels={"c": "3"})
    assert (implied.display_name, dict(implied.labels)) == ("new", {"c": "3"})
    for path in ("packing", "*", "name", "nonsense"):
        refusal = await refused(update([path]))
        assert (refusal.reason, refusal.field) == ("FIELD_INVALID", "update_mask")


async def test_etags_guard_update_and_delete(served: Served) -> None:
    memory = await served.create("guarded")
    await served.append(memory.name, "changes the memory")
    stale = resources.Memory(name=memory.name, display_name="x", etag=memory.etag)
    refusal = await refused(
        served.as_operator(served.memories.UpdateMemory, pb.UpdateMemoryRequest(memory=stale))
    )
    assert (refusal.code, refusal.reason, refusal.field) == (
        "ABORTED",
        "ETAG_MISMATCH",
        "memory.etag",
    )
    delete = pb.DeleteMemoryRequest(name=memory.name, etag=memory.etag)
    refusal = await refused(served.as_operator(served.memories.DeleteMemory, delete))
    assert (refusal.reason, refusal.field) == ("ETAG_MISMATCH", "etag")
    current = await served.as_operator(
        served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name)
    )
    fresh = resources.Memory(name=memory.name, display_name="x", etag=current.etag)
    updated = await served.as_operator(
        served.memories.UpdateMemory, pb.UpdateMemoryRequest(memory=fresh)
    )
    delete = pb.DeleteMemoryRequest(name=memory.name, etag=updated.etag)
    await served.as_operator(served.memories.DeleteMemory, delete)


async def test_a_deleted_memory_is_gone_and_its_name_is_free(served: Served) -> None:
    memory = await served.create("fleeting")
    await served.append(memory.name, "a secret that must go")
    await served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name))
    for method, request, field in (
        (served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name), "name"),
        (served.memories.ListDocuments, pb.ListDocumentsRequest(parent=memory.name), "parent"),
        (
            served.memories.GetDocument,
            pb.GetDocumentRequest(name=f"{memory.name}/documents/1"),
            "name",
        ),
        (served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name), "name"),
    ):
        refusal = await refused(served.as_operator(method, request))
        assert (refusal.code, refusal.reason, refusal.field) == (
            "NOT_FOUND",
            "MEMORY_NOT_FOUND",
            field,
        )
    await served.as_operator(
        served.memories.DeleteMemory,
        pb.DeleteMemoryRequest(name=memory.name, allow_missing=True),
    )
    again = await served.create("fleeting")
    assert again.uid != memory.uid
    assert await served.texts(again.name) == []
    app = served.server.application
    tenant = (await app.catalog.get_tenant("default")).uid
    assert await app.stores.read(tenant, lambda store: store.memories()) == []


async def test_an_etag_of_an_earlier_memory_of_the_name_is_stale(served: Served) -> None:
    first = await served.create("phoenix")
    await served.as_operator(served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=first.name))
    second = await served.create("phoenix")
    assert first.etag != second.etag
    refusal = await refused(
        served.as_operator(
            served.memories.DeleteMemory,
            pb.DeleteMemoryRequest(name=first.name, etag=first.etag),
        )
    )
    assert refusal.reason == "ETAG_MISMATCH"


async def test_quota_of_memories(start: Serve) -> None:
    async with start(max_memories_per_tenant=2) as served:
        await served.create()
        await served.create()
        refusal = await refused(served.create())
        assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "QUOTA_EXCEEDED")
        assert refusal.metadata == {"quota": "max_memories_per_tenant", "limit": "2"}


async def test_pages_of_large_memories_stay_small(served: Served) -> None:
    labels = {f"k{index:02d}": "v" * 256 for index in range(64)}
    made = [
        (await served.create(f"memory-{index:03d}", labels=labels)).name for index in range(150)
    ]
    seen: list[str] = []
    token, pages = "", 0
    while True:
        page = await served.as_operator(
            served.memories.ListMemories, pb.ListMemoriesRequest(page_size=1000, page_token=token)
        )
        assert page.ByteSize() < 2 * 1024 * 1024
        seen += names_of(page.memories)
        token, pages = page.next_page_token, pages + 1
        if not token:
            break
    assert pages > 1
    assert seen == list(reversed(made))


async def test_a_caller_who_leaves_while_it_is_made_leaves_a_sound_memory(served: Served) -> None:
    """The catalog commits what it has begun; the memory's keys must then be there."""
    request = pb.CreateMemoryRequest(
        memory_id="left-behind", memory=resources.Memory(display_name="Left behind")
    )
    await cut_at_commit(
        served,
        "create_memory",
        lambda: served.as_operator(served.memories.CreateMemory, request),
    )
    got = pb.GetMemoryRequest(name="memories/left-behind")
    memory = await served.as_operator(served.memories.GetMemory, got)
    assert memory.display_name == "Left behind"
