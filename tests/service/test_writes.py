from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import lmdb
import pytest
from grpc import StatusCode, aio

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import memory_uid
from storage.catalog import CatalogFullError, CatalogUnavailableError, ModelRow
from storage.keys import document_key
from storage.layout import KVLayout
from tests.support.served import Serve, Served, refused, turns


async def tenant_of(served: Served) -> str:
    return (await served.server.application.catalog.get_tenant("default")).uid


async def stored_numbers(served: Served, memory: str) -> list[int]:
    app = served.server.application
    row = await app.catalog.get_memory(await tenant_of(served), memory.removeprefix("memories/"))
    numbers: list[int] = await app.stores.read(
        row.tenant_uid, lambda store: store.document_numbers(memory_uid(row))
    )
    return numbers


def failing_once(real: Callable[..., Any], error: Exception, *, after: bool) -> Callable[..., Any]:
    """A catalog call that fails the first time: before it was done, or after."""
    failed = False

    async def call(*arguments: object, **named: object) -> object:
        nonlocal failed
        if failed:
            return await real(*arguments, **named)
        failed = True
        if after:
            await real(*arguments, **named)
        raise error

    return call


@pytest.mark.parametrize("after", [False, True])
async def test_sql_failing_between_the_commits_loses_and_doubles_nothing(
    served: Served, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    memory = await served.create("shaky")
    await served.append(memory.name, "before")
    catalog = served.server.application.catalog
    broken = failing_once(catalog.commit_append, CatalogUnavailableError("gone"), after=after)
    monkeypatch.setattr(catalog, "commit_append", broken)
    answer = await refused(served.append(memory.name, "x", "y", request_id="r-1"))
    assert answer.retry_s
    assert await served.texts(memory.name) == (["before", "x", "y"] if after else ["before"])
    # What is left in LMDB is overwritten, and a retry is safe whichever it was.
    reply = await served.append(memory.name, "x", "y", request_id="r-1")
    assert reply.revision == 2
    assert await served.texts(memory.name) == ["before", "x", "y"]
    assert await stored_numbers(served, memory.name) == [1, 2, 3]


async def test_an_orphan_does_not_shine_through_a_shorter_append(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = await served.create("shaky")
    catalog = served.server.application.catalog
    with monkeypatch.context() as patch:
        full = failing_once(catalog.commit_append, CatalogFullError("full"), after=False)
        patch.setattr(catalog, "commit_append", full)
        answer = await refused(served.append(memory.name, "lost 1", "lost 2", "lost 3"))
        assert (answer.reason, answer.retry_s) == ("STORAGE_FULL", None)
    await served.append(memory.name, "kept")
    assert await served.texts(memory.name) == ["kept"]
    refusal = await refused(
        served.as_operator(
            served.memories.GetDocument, pb.GetDocumentRequest(name=f"{memory.name}/documents/2")
        )
    )
    assert refusal.reason == "DOCUMENT_NOT_FOUND"


async def test_reconcile_removes_orphans_at_the_next_start(
    start: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with start() as served:
        memory = await served.create("shaky")
        await served.append(memory.name, "kept")
        catalog = served.server.application.catalog
        full = failing_once(catalog.commit_append, CatalogFullError("full"), after=False)
        monkeypatch.setattr(catalog, "commit_append", full)
        await refused(served.append(memory.name, "lost"))
        assert await stored_numbers(served, memory.name) == [1, 2]
    async with start() as served:
        assert await stored_numbers(served, memory.name) == [1]


async def test_a_full_store_is_a_clean_refusal(start: Serve) -> None:
    async with start(max_store_bytes=2 * 1024 * 1024) as served:
        memory = await served.create("growing")
        kept = 0
        answer = None
        for index in range(200):
            # Random digits, so that compression does not hide the growth.
            text = "".join(f"{hash((index, i)) & 0xFFFFFFFFFFFF:x}" for i in range(8000))
            try:
                await served.append(memory.name, text)
            except aio.AioRpcError:
                answer = await refused(served.append(memory.name, text))
                break
            kept += 1
        assert answer is not None
        assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "STORAGE_FULL")
        got = await served.as_operator(
            served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name)
        )
        assert (got.revision, got.document_count) == (kept, kept)
        # Deleting works when full, and makes room.
        await served.as_operator(
            served.memories.DeleteMemory, pb.DeleteMemoryRequest(name=memory.name)
        )
        other = await served.create("other")
        await served.append(other.name, "fits again")


async def test_a_caller_that_leaves_before_its_turn_writes_nothing(served: Served) -> None:
    memory = await served.create("queued")
    locks = served.server.application.writes.locks
    async with locks.exclusive(await tenant_of(served), "queued"):
        with pytest.raises(aio.AioRpcError) as caught:
            await served.as_operator(
                served.memories.AppendTurns,
                pb.AppendTurnsRequest(memory=memory.name, turns=turns("late")),
                timeout=0.1,
            )
        assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        await asyncio.sleep(0.05)
    await served.append(memory.name, "next")
    assert await served.texts(memory.name) == ["next"]


async def test_a_caller_that_leaves_during_its_write_leaves_it_whole(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = await served.create("leaving")
    catalog = served.server.application.catalog
    real, entered = catalog.commit_append, asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        entered.set()
        await asyncio.sleep(0.2)
        return await real(*arguments)

    monkeypatch.setattr(catalog, "commit_append", slow)
    request = pb.AppendTurnsRequest(memory=memory.name, turns=turns("a", "b"), request_id="r-1")
    call = served.as_operator(served.memories.AppendTurns, request)
    await asyncio.wait_for(entered.wait(), 5)
    call.cancel()
    await served.server.application.writes.drain()
    assert await served.texts(memory.name) == ["a", "b"]
    reply = await served.append(memory.name, "a", "b", request_id="r-1")
    assert reply.revision == 1


async def test_a_caller_that_leaves_before_sql_undoes_its_write(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = await served.create("leaving")
    await served.append(memory.name, "before")
    stores = served.server.application.stores
    real, entered, go_on = stores.run, asyncio.Event(), asyncio.Event()

    async def slow(*arguments: Any) -> Any:
        result = await real(*arguments)
        entered.set()
        await go_on.wait()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(stores, "run", slow)
        request = pb.AppendTurnsRequest(memory=memory.name, turns=turns("a", "b"), request_id="r")
        call = served.as_operator(served.memories.AppendTurns, request)
        await asyncio.wait_for(entered.wait(), 5)
        call.cancel()
        async with asyncio.timeout(5):
            while served.server._gate.calls:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.01)
    go_on.set()
    await served.server.application.writes.drain()
    assert await stored_numbers(served, memory.name) == [1]
    reply = await served.append(memory.name, "other payload", request_id="r")
    assert (reply.revision, len(reply.documents)) == (2, 1)
    assert await served.texts(memory.name) == ["before", "other payload"]


async def test_a_damaged_record_is_data_loss_and_names_nothing_else(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("damaged")
        await served.append(memory.name, "sound", "to be damaged")
        app = served.server.application
        row = await app.catalog.get_memory_by_uid(memory.uid)
        path = app.data.tenant(row.tenant_uid)
    key = document_key(memory_uid(row), 2)
    with lmdb.open(str(path)) as environment, environment.begin(write=True) as transaction:
        value = bytearray(transaction.get(key) or b"")
        value[-1] ^= 1
        transaction.put(key, bytes(value))
    async with start() as served:
        answer = await refused(
            served.as_operator(
                served.memories.GetDocument,
                pb.GetDocumentRequest(name=f"{memory.name}/documents/2"),
            )
        )
        assert (answer.code, answer.reason) == ("DATA_LOSS", "RECORD_CORRUPT")
        sound = await served.as_operator(
            served.memories.GetDocument, pb.GetDocumentRequest(name=f"{memory.name}/documents/1")
        )
        assert sound.conversation.turns[0].text == "sound"


MODEL = ModelRow(
    model_id="slow-model",
    display_name="",
    identity="ab" * 32,
    layout=KVLayout((0,), 1, 8, 4, "fp32", False),
    max_document_tokens=100,
    max_question_tokens=100,
    max_answer_tokens=100,
    default=True,
    last_seen_us=1,
)


async def test_a_full_backlog_refuses_writes_with_a_hint(start: Serve) -> None:
    async with start() as served:
        await served.server.application.catalog.upsert_model(MODEL)
    async with start(backlog_documents=3) as served:
        memory = await served.create("waiting")
        await served.append(memory.name, "a", "b", "c")
        answer = await refused(served.append(memory.name, "d"))
        assert (answer.code, answer.reason) == ("RESOURCE_EXHAUSTED", "ENCODING_BACKLOG_FULL")
        assert answer.retry_s is not None
        assert answer.retry_s >= 1
        assert await served.texts(memory.name) == ["a", "b", "c"]
        got = await served.as_operator(
            served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name)
        )
        assert [e.pending_documents for e in got.encodings] == [3]


async def test_writes_while_an_import_fills_the_memory(served: Served) -> None:
    from memsvc.packing import policy
    from storage.catalog import MemoryState, PackingMode

    app = served.server.application
    await app.catalog.create_memory(
        await tenant_of(served),
        "importing",
        "",
        {},
        policy(PackingMode.TURN),
        MemoryState.IMPORTING,
        None,
    )
    answer = await refused(served.append("memories/importing", "x"))
    assert (answer.code, answer.reason, answer.field) == (
        "FAILED_PRECONDITION",
        "MEMORY_NOT_ACTIVE",
        "memory",
    )
    assert answer.metadata == {"state": "IMPORTING"}
    got = await served.as_operator(
        served.memories.GetMemory, pb.GetMemoryRequest(name="memories/importing")
    )
    assert got.document_count == 0
    await served.as_operator(
        served.memories.DeleteMemory, pb.DeleteMemoryRequest(name="memories/importing")
    )
