"""The client against the real server with the fake engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from memsvc.client import (
    AlreadyExistsError,
    ArchiveInvalidError,
    AsyncClient,
    Client,
    Conversation,
    DeadlineExceededError,
    EncodingState,
    EtagMismatchError,
    Filter,
    Generation,
    InvalidArgumentError,
    MemoryState,
    NotFoundError,
    Packing,
    PackingMode,
    PermissionDeniedError,
    RequestIdReusedError,
    Role,
    Scope,
    TextSource,
    Turn,
    UnauthenticatedError,
)
from tests.support.live import LiveServer, live_server

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("live") / "data") as made:
        yield made


@pytest.fixture
async def client(server: LiveServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, server.api_key) as made:
        yield made


async def test_a_memory_from_creation_to_deletion(client: AsyncClient) -> None:
    made = await client.memories.create(
        "life", display_name="Life", labels={"a": "b"}, packing=Packing(PackingMode.WINDOW, 2)
    )
    assert (made.id, made.display_name, made.labels) == ("life", "Life", {"a": "b"})
    assert made.packing.mode is PackingMode.WINDOW
    assert made.state is MemoryState.ACTIVE
    assert await client.memories.get("life") == made
    changed = await client.memories.update("life", labels={}, etag=made.etag)
    assert (changed.labels, changed.display_name) == ({}, "Life")
    with pytest.raises(EtagMismatchError):
        await client.memories.update("life", display_name="X", etag=made.etag)
    await client.memories.delete("life")
    with pytest.raises(NotFoundError):
        await client.memories.get("life")
    await client.memories.delete("life", allow_missing=True)


async def test_turns_come_back_as_they_were_sent(client: AsyncClient) -> None:
    await client.memories.create("turns")
    handle = client.memory("turns")
    turns = [
        Turn(Role.USER, "I moved to Lisbon in March.", NOON, "Anna", "s1", {"source": "phone"}),
        Turn(Role.ASSISTANT, "How do you like it?\nTell me.", NOON + timedelta(seconds=1.5)),
    ]
    written = await handle.append(turns)
    assert written.documents == ("memories/turns/documents/1", "memories/turns/documents/2")
    documents = [d async for d in handle.documents.iterate(full=True)]
    found = [t for d in documents if isinstance(d.source, Conversation) for t in d.source.turns]
    assert found == turns
    assert (await handle.documents.get(1)).name == written.documents[0]
    basic = await handle.documents.list()
    assert [d.source for d in basic.items] == [None, None]


async def test_texts_longer_than_a_message_are_put_in_pieces(client: AsyncClient) -> None:
    await client.memories.create("texts")
    handle = client.memory("texts")
    long = TextSource("é" * 500_000, title="Long", occurred_at=NOON, metadata={"k": "v"})
    texts = [long, *(TextSource(f"note {n} " + "x" * 900_000) for n in range(6))]
    written = await handle.put(texts)
    assert len(written.documents) == 7
    assert (await handle.documents.get(written.documents[0])).source == long


async def test_a_request_id_makes_a_repeat_the_same_write(client: AsyncClient) -> None:
    await client.memories.create("twice")
    handle = client.memory("twice")
    first = await handle.append([Turn("user", "once")], request_id="r1")
    assert await handle.append([Turn("user", "once")], request_id="r1") == first
    assert (await client.memories.get("twice")).document_count == 1
    with pytest.raises(RequestIdReusedError):
        await handle.append([Turn("user", "other")], request_id="r1")


async def test_ask_retrieve_and_cite(client: AsyncClient) -> None:
    await client.memories.create("asked")
    handle = client.memory("asked")
    written = await handle.append(
        [Turn("user", f"The lighthouse number {n} is painted colour{n}.") for n in range(20)]
    )
    answer = await handle.ask("What is colour7?", at_least_revision=written.revision)
    assert "colour7" in answer.text
    assert answer.citations[0].number == 8
    assert isinstance(
        answer.citations[0].content and answer.citations[0].content.source, Conversation
    )
    assert answer.usage is not None
    assert answer.usage.routed_documents == 20
    assert answer.done.revision == written.revision
    short = await handle.ask("What is colour7?", options=Generation(max_answer_tokens=2))
    assert len(short.text.split()) == 2
    ranked = await handle.retrieve("colour7", limit=1)
    assert [d.number for d in ranked.documents] == [8]
    with pytest.raises(NotFoundError):
        await handle.ask("?", model="no-such-model")


async def test_watch_until_ready(client: AsyncClient) -> None:
    await client.memories.create("watched")
    handle = client.memory("watched")
    written = await handle.append([Turn("user", f"fact {n}") for n in range(50)])
    async with asyncio.timeout(30):
        async for progress in handle.watch():
            states = [e.state for e in progress.encodings]
            if progress.revision == written.revision and states == [EncodingState.READY]:
                break
    with pytest.raises(DeadlineExceededError):
        async for _ in handle.watch(timeout_s=0.3):
            pass


async def test_a_watch_ends_when_the_memory_is_deleted(client: AsyncClient) -> None:
    await client.memories.create("short-lived")
    stream = client.memory("short-lived").watch(timeout_s=30)
    await anext(stream)
    await client.memories.delete("short-lived")
    with pytest.raises(NotFoundError):
        async for _ in stream:
            pass


async def test_export_import_round_trip(client: AsyncClient, tmp_path: Path) -> None:
    await client.memories.create("source")
    handle = client.memory("source")
    await handle.append([Turn("user", f"The harbour has berth{n}.", NOON) for n in range(30)])
    await handle.ask("Are all encoded?")
    archive = tmp_path / "source.archive"
    written = await handle.export_to(archive)
    sent: list[int] = []
    made = await client.memories.import_archive(archive, memory_id="copy", on_sent=sent.append)
    assert sent[-1] == written
    assert (made.reused_blocks, made.documents_to_encode) == (30, 0)
    answer = await client.memory("copy").ask("Where is berth21?")
    assert "berth21" in answer.text
    with pytest.raises(AlreadyExistsError):
        await client.memories.import_archive(archive, memory_id="copy")
    with pytest.raises(ArchiveInvalidError):
        await client.memories.import_archive(b"no archive at all")


async def test_errors_name_the_field(client: AsyncClient) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await client.memories.create("UPPER")
    assert caught.value.field == "memory_id"
    await client.memories.create("strict")
    with pytest.raises(InvalidArgumentError) as caught:
        await client.memory("strict").append([Turn("user", "ok"), Turn("user", "bell\x07")])
    assert (caught.value.reason, caught.value.field) == ("TEXT_NOT_CLEAN", "turns[1].text")


async def test_iterate_over_many_pages(client: AsyncClient) -> None:
    names = [f"page-{n:02}" for n in range(7)]
    for name in names:
        await client.memories.create(name)
    listed = [memory.id async for memory in client.memories.iterate(page_size=3)]
    assert [name for name in listed if name.startswith("page-")] == names[::-1]


async def test_administration(client: AsyncClient, server: LiveServer) -> None:
    tenant = await client.admin.create_tenant("others", display_name="Others")
    newest, *_ = [t async for t in client.admin.iterate_tenants(page_size=1)]
    assert newest == tenant
    assert await client.admin.get_tenant("others") == tenant
    made = await client.admin.create_api_key("others", Scope.READ, display_name="reader")
    assert made.secret not in repr(made)
    async with AsyncClient(server.address, made.secret) as reader:
        assert (await reader.memories.list()).items == ()
        with pytest.raises(PermissionDeniedError):
            await reader.memories.create("nothing")
        await client.admin.revoke_api_key(made.api_key.name)
        with pytest.raises(UnauthenticatedError):
            await reader.memories.list()
    keys = [key async for key in client.admin.iterate_api_keys("others")]
    assert [key.revoke_time is not None for key in keys] == [True]
    assert (await client.admin.usage("default")).memories > 0
    await client.admin.delete_tenant("others")


def test_the_blocking_client_does_the_same(server: LiveServer) -> None:
    with Client(server.address, server.api_key) as client:
        client.memories.create("blocking")
        handle = client.memory("blocking")
        handle.append([Turn("user", "The key is under the green stone.")])
        assert "green stone" in handle.ask("Where is the key?").text
        assert [m.state for m in client.models.iterate()] == ["serving"]
        assert next(handle.watch()).revision == 1
        client.memories.delete("blocking")


async def test_filters(client: AsyncClient) -> None:
    await client.memories.create("told")
    told = client.memory("told")
    await told.append(
        [
            Turn(Role.USER, "Anna moved to Graz", occurred_at=NOON, speaker="Anna"),
            Turn(Role.USER, "Bob moved to Oslo", speaker="Bob", metadata={"app": "mail"}),
            Turn(Role.ASSISTANT, "Who moved where?", metadata={"app": "chat"}),
        ]
    )

    async def found(only: Filter | None) -> list[int]:
        listed = [d.number async for d in told.documents.iterate(page_size=1, only=only)]
        ranked = await told.retrieve("Who moved where?", only=only)
        assert sorted(d.number for d in ranked.documents) == listed
        return listed

    assert await found(None) == await found(Filter()) == [1, 2, 3]
    assert await found(Filter(occurred_from=NOON)) == [1]
    assert await found(Filter(occurred_before=NOON)) == []
    assert await found(Filter(roles=Role.ASSISTANT)) == [3]
    assert await found(Filter(roles=["assistant", Role.TOOL], speakers="Anna")) == []
    assert await found(Filter(speakers=("Anna", "Bob"))) == [1, 2]
    assert await found(Filter(metadata={"app": "mail"})) == [2]
    assert await found(Filter(metadata={"app": ["mail", "chat"]})) == [2, 3]
    assert await found(Filter(metadata={"app": ()})) == [2, 3]
    answer = await told.ask("Who moved where?", only=Filter(speakers=["Bob"]))
    assert [citation.number for citation in answer.citations] == [2] and "Oslo" in answer.text
    assert answer.usage is not None and answer.usage.routed_documents == 1
    with pytest.raises(InvalidArgumentError) as refused:
        await told.ask("Who?", only=Filter(metadata={"App": "mail"}))
    assert refused.value.field == "filter.metadata[0].key"
