"""The encoding queue against a real worker: crashes, bad documents, bounds, deletions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from memsvc.encoding.pipeline import Pipeline
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.workers import WorkerClient, WorkerFaultError
from storage.catalog import Catalog, MemoryRow
from storage.keys import Kind
from storage.layout import KVBlock, KVLayout
from storage.lmdb_store import LmdbStore
from storage.store import EncodingId, MemoryUid
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, asking, eventually
from tests.support.held import Held
from tests.support.keys import open_store
from tests.support.served import Folder, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_everything_is_encoded_and_counted(shared: Asking) -> None:
    memories = [await shared.create() for _ in range(5)]
    for index, memory in enumerate(memories):
        await shared.append(memory.name, *(f"text {index} {n}" for n in range(30 * index + 1)))
    for memory in memories:
        await shared.ready(memory.name)
    for index, memory in enumerate(memories):
        encoding = await shared.ready(memory.name)
        assert encoding.encoded_documents == 30 * index + 1
        assert encoding.tokens == 4 * encoding.encoded_documents
        assert encoding.bytes > 0 and encoding.quarantined_documents == 0
        row = await shared.row(memory.name)
        assert await shared.blocks(row) == list(range(1, 30 * index + 2))
        assert await shared.problems(row) == []


async def test_a_document_the_model_cannot_take_is_set_aside(start: Serve) -> None:
    async with start(worker_model="fake:max_document_tokens=20") as served:
        memory = await served.create()
        await served.append(memory.name, "a boiler", "boiler " * 30, "another boiler")
        encoding = await served.ready(memory.name)
        assert encoding.quarantined_documents == 1 and encoding.encoded_documents == 2
        row = await served.row(memory.name)
        assert await served.app.catalog.quarantined(row.uid, "fake") == {2: "DOCUMENT_TOO_LONG"}
        answer = await served.ask(memory.name, "boiler?", at_least_revision=1)
        assert 2 not in answer.cited
        assert len(await served.texts(memory.name)) == 3
        await served.delete_documents(memory.name, 2)
        assert (await served.get(memory.name)).encodings[0].quarantined_documents == 0


async def test_a_document_that_breaks_the_worker_is_found_and_set_aside_alone(
    start: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = WorkerClient.encode

    def failing(self: WorkerClient, *arguments: Any) -> Any:
        documents = arguments[2]
        if any("poison" in document.text for document in documents):
            raise WorkerFaultError("as if the engine had failed on the batch")
        return encode(self, *arguments)

    monkeypatch.setattr(WorkerClient, "encode", failing)
    async with start() as served:
        memory, other = await served.create(), await served.create()
        texts = [f"text {n}" for n in range(20)]
        texts[12] = "poison"
        await served.append(memory.name, *texts)
        await served.append(other.name, *(f"text {n}" for n in range(20)))
        assert (await served.ready(other.name)).quarantined_documents == 0
        encoding = await served.ready(memory.name)
        assert encoding.encoded_documents == 19
        row = await served.row(memory.name)
        assert await served.app.catalog.quarantined(row.uid, "fake") == {13: "INTERNAL_FAULT"}
        assert await served.problems(row) == []


async def test_a_killed_worker_loses_nothing(start: Serve) -> None:
    chance = random.Random(7)
    async with start(worker_model="fake:encode_ms=3", encode_batch_documents=16) as served:
        memories = [await served.create() for _ in range(3)]
        for round_number in range(2):
            for memory in memories:
                texts = [f"round {round_number} document {n}" for n in range(40)]
                await served.append(memory.name, *texts)
            await asyncio.sleep(chance.uniform(0.05, 0.3))
            await served.kill_worker()
        for memory in memories:
            encoding = await served.ready(memory.name)
            assert encoding.encoded_documents == 80 and encoding.quarantined_documents == 0
            assert encoding.tokens == 80 * 5
            row = await served.row(memory.name)
            assert await served.blocks(row) == list(range(1, 81))
            assert await served.problems(row) == []
        answer = await served.ask(memories[0].name, "round document")
        assert answer.cited


async def test_blocks_written_before_a_crash_are_not_made_again(start: Serve) -> None:
    async with start() as served:
        memory = await served.create()
        await served.append(memory.name, *(f"text {n}" for n in range(50)))
        before = await served.ready(memory.name)
        row = await served.row(memory.name)
        # Usage is counted a moment after the watermark moved.
        await eventually(lambda: _used(served, row, before.tokens))
        # As after a crash between the blocks and the watermark.
        await served.app.catalog.rewind_encoding(row.uid, "fake", 11)
        served.app.encoding.wake()
        after = await served.ready(memory.name)
        assert after.encoded_documents == 50
        # Sums are estimates once a watermark was put back.
        assert abs(after.tokens - before.tokens) < 10
        # One more is counted behind whatever was made again.
        await served.append(memory.name, "text 50")
        one_more = await eventually(lambda: _used(served, row, before.tokens + 1))
        assert one_more == before.tokens + 3


async def _used(served: Asking, row: MemoryRow, tokens: int) -> int:
    """Tokens encoded for the tenant, once there are so many."""
    found = (await served.app.catalog.usage(row.tenant_uid)).encoded_tokens
    return found if found >= tokens else 0


async def test_what_a_batch_made_while_the_backlog_was_read_is_not_made_again(
    start: Serve,
) -> None:
    async with start() as served:
        memory = await served.create()
        catalog = served.app.catalog
        committing = Held(catalog, "commit_encoded")
        await served.append(memory.name, "one text")
        await committing.reached.wait()
        reading = Held(catalog, "backlog", after=True)
        await served.append(memory.name, "another text")
        await reading.reached.wait()
        # What was read says that both wait.
        for held in (committing, reading):
            held.let_others_pass()
        committing.go_on.set()
        pipelines = [pipeline for pipeline, _ in served.app.encoding._pipelines.values()]
        await eventually(lambda: _idle(pipelines))
        reading.go_on.set()
        encoding = await served.ready(memory.name)
        assert (encoding.encoded_documents, encoding.tokens) == (2, 6)


async def _idle(pipelines: Sequence[Pipeline]) -> bool:
    return not any(pipeline._batches for pipeline in pipelines)


async def test_a_full_backlog_refuses_writes_until_it_falls(start: Serve) -> None:
    async with start(worker_model="fake:encode_ms=600", backlog_documents=5) as served:
        memory = await served.create()
        await served.worker_pid()
        await eventually(lambda: _bounded(served))
        await served.append(memory.name, *(f"text {n}" for n in range(5)))
        found = await refused(served.append(memory.name, "one more"))
        assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "ENCODING_BACKLOG_FULL")
        assert found.retry_s is not None and 1 <= found.retry_s <= 60
        assert (await served.get(memory.name)).document_count == 5
        await eventually(lambda: _accepts(served, memory.name))


async def _bounded(served: Asking) -> bool:
    """Whether the queue has counted what waits under the model."""
    return bool(served.app.encoding._bounding)


async def _accepts(served: Asking, memory: str) -> bool:
    try:
        await served.append(memory, "more")
    except Exception:  # noqa: BLE001 - tried again until it works or patience ends
        return False
    return True


async def test_what_is_deleted_while_it_is_encoded_leaves_no_block(start: Serve) -> None:
    async with start(worker_model="fake:encode_ms=4", encode_batch_documents=32) as served:
        memory, gone = await served.create(), await served.create()
        await served.append(memory.name, *(f"text {n}" for n in range(120)))
        await served.append(gone.name, *(f"text {n}" for n in range(120)))
        gone_row = await served.row(gone.name)
        await asyncio.sleep(0.1)
        for numbers in (range(1, 21), range(50, 70), range(100, 121)):
            await served.delete_documents(memory.name, *numbers)
            await asyncio.sleep(0.03)
        await served.delete(gone.name)
        encoding = await served.ready(memory.name)
        row = await served.row(memory.name)
        live = [*range(21, 50), *range(70, 100)]
        assert encoding.encoded_documents == len(live)
        assert await served.blocks(row) == live
        assert await served.problems(row) == []
        held = await served.app.stores.read(row.tenant_uid, lambda store: store.memories())
        assert MemoryUid(bytes.fromhex(gone_row.uid)) not in held


async def test_a_damaged_block_is_made_again_from_its_text(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "Olga repaired the boiler", "My cat is called Mittens")
    await shared.ready(memory.name)
    row = await shared.row(memory.name)
    await shared.app.stores.run(row.tenant_uid, _damage_blocks, bytes.fromhex(row.uid))
    assert await shared.problems(row)
    answer = await shared.ask(memory.name, "Who repaired the boiler?")
    assert answer.cited == [1]
    assert await shared.problems(row) == []


async def test_a_memory_deleted_while_its_block_is_made_again_is_no_memory(
    shared: Asking,
) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "Olga repaired the boiler")
    await shared.ready(memory.name)
    row = await shared.row(memory.name)
    await shared.app.stores.run(row.tenant_uid, _damage_blocks, bytes.fromhex(row.uid))
    rebuilding = Held(shared.app.encoding, "rebuild")
    question = pb.RetrieveRequest(memory=memory.name, question="Who repaired the boiler?")
    call = shared.as_operator(shared.memories.Retrieve, question)
    question_asked = asyncio.ensure_future(refused(call))
    await rebuilding.reached.wait()
    rebuilding.let_others_pass()
    await shared.delete(memory.name)
    rebuilding.go_on.set()
    assert (await question_asked).reason == "MEMORY_NOT_FOUND"


def _damage_blocks(store: object, memory: bytes) -> None:
    """Flips one bit in every block record of a memory."""
    assert isinstance(store, LmdbStore)
    for key, value in list(store.iter_raw()):
        if key[:16] == memory and key[16] in (Kind.ROUTING, Kind.CONTENT):
            spoiled = bytearray(value)
            spoiled[-3] ^= 1
            store._environment.write(lambda t, k=key, v=bytes(spoiled): t.put(k, v), len(value))  # type: ignore[misc]  # the loop's values, bound


async def test_new_weights_under_the_same_name_encode_afresh(folder: Folder, start: Serve) -> None:
    old = "ab" * 32
    async with start() as served:
        memory = await served.create()
        await served.append(memory.name, *(f"text {n}" for n in range(5)))
        await served.ready(memory.name)
        row = await served.row(memory.name)
        config = served.app.config
        model = await served.app.catalog.default_model()
        assert model is not None
    # As if all this had been encoded by a worker of other weights.
    catalog = await Catalog.open(config.catalog_url)
    await catalog.upsert_model(replace(model, identity=old))
    await catalog.commit_encoded(row.uid, "fake", old, 5, 5, 25, 100, {})
    await catalog.close()
    uid = MemoryUid(bytes.fromhex(row.uid))
    now = EncodingId(bytes.fromhex(model.identity)[:16])
    store = open_store(config.folder, row.tenant_uid)
    blocks = [_rebuilt(store, uid, now, model.layout, number) for number in range(1, 6)]
    store.delete_encoding(uid, now)
    store.put_blocks(uid, EncodingId(bytes.fromhex(old)[:16]), model.layout, blocks)
    store.close()
    async with asking(folder, config.data) as served:
        answer = await served.ask(memory.name, "text 3")
        assert answer.done is not None
        assert (await served.ready(memory.name)).encoded_documents == 5

        async def only_new() -> bool:
            held = await served.app.stores.read(row.tenant_uid, lambda s: s.encodings(uid))
            return held == [now]

        await eventually(only_new)


def _rebuilt(
    store: LmdbStore, uid: MemoryUid, encoding: EncodingId, layout: KVLayout, number: int
) -> KVBlock:
    (part,) = store.iter_routing(uid, encoding, layout, number, number)
    content = store.get_content(uid, encoding, layout, number)
    return KVBlock(number, part.tokens, part.routing_key_LCE, content.key_LCE, content.value_LCE)
