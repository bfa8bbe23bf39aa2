"""ExportMemory and ImportMemory through the whole service."""

from __future__ import annotations

import asyncio
import io
import random
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import lmdb
import pytest

from memsvc.packing import policy
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.archive import open_archive
from storage.catalog import MemoryState, PackingMode
from storage.keys import Kind
from storage.lmdb_store import LmdbStore
from storage.store import TenantStore
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, eventually
from tests.support.archives import EMPTY, pack, sample
from tests.support.blocks import make_document
from tests.support.served import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


def _export(served: Asking, memory: str, **fields: Any) -> Any:
    request = pb.ExportMemoryRequest(name=memory, **fields)
    return served.as_operator(served.memories.ExportMemory, request)


async def _exported(served: Asking, memory: str, **fields: Any) -> bytes:
    pieces = [reply async for reply in _export(served, memory, **fields)]
    data = b"".join(piece.data for piece in pieces)
    assert pieces[0].total_bytes == len(data)
    assert all(len(piece.data) <= 2**20 and not piece.total_bytes for piece in pieces[1:])
    return data


def _import(served: Asking, data: bytes, piece: int = 2**20, **header: Any) -> Any:
    def messages() -> Iterator[pb.ImportMemoryRequest]:
        yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header(**header))
        for start in range(0, len(data), piece):
            yield pb.ImportMemoryRequest(data=data[start : start + piece])

    return served.as_operator(served.memories.ImportMemory, messages())


async def _count(served: Asking) -> int:
    """Memories that can be listed."""
    page = await served.as_operator(
        served.memories.ListMemories, pb.ListMemoriesRequest(page_size=1000)
    )
    return len(page.memories)


async def _nothing_remains(served: Asking, before: int) -> None:
    """No staging file, no half memory, no store record of one."""
    assert await _count(served) == before
    assert await served.app.catalog.memories_in_state(MemoryState.IMPORTING) == []
    assert list(served.app.data.staging.iterdir()) == []
    tenant = await served.app.catalog.get_tenant("default")
    held = await served.app.stores.read(tenant.uid, lambda store: store.memories())
    rows, _ = await served.app.catalog.list_memories(tenant.uid, 100)
    assert {uid.hex() for uid in held} <= {row.uid for row in rows}


async def test_a_memory_survives_the_round_trip(shared: Asking) -> None:
    before = await _count(shared)
    memory = await shared.create("origin", display_name="Origin", labels={"team": "blue"})
    await shared.append(memory.name, *(f"note {n} about boilers" for n in range(40)))
    await shared.append(memory.name, "Olga repaired the boiler on Tuesday")
    await shared.ready(memory.name)
    await shared.delete_documents(memory.name, 3, 7)
    data = await _exported(shared, memory.name)
    reply = await _import(shared, data, memory_id="copied", request_id="once")
    assert reply.memory.name == "memories/copied"
    assert reply.memory.display_name == "Origin" and reply.memory.labels == {"team": "blue"}
    assert reply.memory.state == resources.Memory.ACTIVE
    assert reply.memory.uid != memory.uid
    assert (reply.reused_blocks, reply.documents_to_encode) == (39, 0)
    copied = await shared.get(reply.memory.name)
    assert copied.encodings[0].state == resources.Encoding.READY
    assert copied.document_count == 39
    assert await shared.texts(copied.name) == await shared.texts(memory.name)
    answer = await shared.ask(copied.name, "Who repaired the boiler on Tuesday?")
    assert answer.cited == [41]
    assert "Olga" in answer.text
    row = await shared.row(copied.name)
    assert await shared.problems(row) == []
    # Numbers go on where the original stood: none is given out twice.
    await shared.delete_documents(copied.name, 41)
    written = await shared.append(copied.name, "new")
    assert written.documents == ["memories/copied/documents/42"]
    await _nothing_remains(shared, before + 2)


async def test_without_blocks_it_is_encoded_afresh(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "the boiler leaks", "the cat sleeps")
    await shared.ready(memory.name)
    data = await _exported(shared, memory.name, without_blocks=True)
    reply = await _import(shared, data, memory_id="afresh", display_name="Other")
    assert (reply.reused_blocks, reply.documents_to_encode) == (0, 2)
    assert reply.memory.display_name == "Other"
    assert (await shared.ready(reply.memory.name)).encoded_documents == 2
    assert (await shared.ask(reply.memory.name, "boiler")).cited == [1]


async def test_an_empty_memory_survives_too(shared: Asking) -> None:
    memory = await shared.create()
    reply = await _import(shared, await _exported(shared, memory.name))
    assert reply.memory.document_count == 0 and reply.documents_to_encode == 0
    assert (await shared.ask(reply.memory.name, "anything?")).done is not None


async def test_an_export_is_of_one_revision_while_writes_go_on(
    shared: Asking, tmp_path_factory: pytest.TempPathFactory
) -> None:
    memory = await shared.create()
    await shared.append(memory.name, *(f"first {n}" for n in range(200)))
    stop = asyncio.Event()

    async def write() -> None:
        number = 0
        while not stop.is_set():
            await shared.append(memory.name, f"later {number} a", f"later {number} b")
            number += 1

    writing = asyncio.create_task(write())
    path = tmp_path_factory.mktemp("export") / "archive"
    for _ in range(4):
        path.write_bytes(await _exported(shared, memory.name))
        with open_archive(path) as archive:
            numbers = [document.number for document in archive.documents()]
            assert numbers == list(range(1, archive.manifest.last_number + 1))
            # Each later revision added two documents: none is there by half.
            assert len(numbers) == 200 + 2 * (archive.manifest.revision - 1)
    stop.set()
    await writing


async def test_an_export_that_its_reader_leaves_cleans_up(shared: Asking) -> None:
    memory = await shared.create()
    text = "boiler " * 20_000
    await shared.append(memory.name, *(f"{n} {text}" for n in range(20)))
    call = _export(shared, memory.name)
    await call.read()
    call.cancel()
    await eventually(lambda: _idle(shared))


async def _idle(served: Asking) -> bool:
    return not list(served.app.data.staging.iterdir()) and not served.app.progress.subscribers


async def test_a_retried_import_makes_one_memory(shared: Asking) -> None:
    before = await _count(shared)
    memory = await shared.create()
    await shared.append(memory.name, "kept")
    data = await _exported(shared, memory.name)
    first = await _import(shared, data, memory_id="target", request_id="again")
    second = await _import(shared, data, memory_id="target", request_id="again", piece=77)
    assert second.memory.uid == first.memory.uid
    found = await refused(_import(shared, data, memory_id="other", request_id="again"))
    assert found.reason == "REQUEST_ID_REUSED"
    found = await refused(_import(shared, data, memory_id="target"))
    assert (found.reason, found.field) == ("ALREADY_EXISTS", "memory_id")
    await _nothing_remains(shared, before + 2)


async def test_bad_archives_leave_nothing(shared: Asking) -> None:
    before = await _count(shared)
    good = sample()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 4
    newer = good.replace(b'"version":1', b'"version":9', 1)
    cases = {
        "nothing": (b"", "ARCHIVE_TRUNCATED"),
        "cut": (good[: len(good) // 2], "ARCHIVE_TRUNCATED"),
        "altered": (bytes(flipped), "ARCHIVE_CORRUPT"),
        "no archive": (b"not an archive at all" * 100, "ARCHIVE_CORRUPT"),
        "newer": (newer, "ARCHIVE_VERSION_UNSUPPORTED"),
        "foreign member": (_tar_with("../../etc/passwd"), "ARCHIVE_"),
        "too long a text": (_archive("x" * 300_000), "ARCHIVE_FORBIDDEN"),
        "control characters": (_archive("fine", "a\x07b"), "ARCHIVE_FORBIDDEN"),
        "bad labels": (_archive("fine", labels={"über": "x"}), "ARCHIVE_FORBIDDEN"),
    }
    for name, (data, reason) in cases.items():
        found = await refused(_import(shared, data))
        assert found.reason.startswith(reason), name
        await _nothing_remains(shared, before)


def _archive(*texts: str, **manifest: Any) -> bytes:
    """A well-formed archive of these texts."""
    documents = [make_document(number, text) for number, text in enumerate(texts, 1)]
    return pack(documents, manifest=replace(EMPTY, **{"labels": {}, **manifest}))


def _tar_with(name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    return out.getvalue()


async def test_the_stream_has_an_order(shared: Asking) -> None:
    before = await _count(shared)
    header = pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header())
    data = pb.ImportMemoryRequest(data=b"x")
    for messages in ([], [data], [header, header], [pb.ImportMemoryRequest()]):
        call = shared.as_operator(shared.memories.ImportMemory, iter(messages))
        assert (await refused(call)).reason == "STREAM_PROTOCOL"
    for field, value in (
        ("memory_id", "Bad Id"),
        ("request_id", "no spaces"),
        ("display_name", "x" * 300),
    ):
        header_fields: dict[str, Any] = {field: value}
        found = await refused(_import(shared, b"", **header_fields))
        assert found.field == f"header.{field}"
    await _nothing_remains(shared, before)


async def test_an_import_that_its_sender_leaves_leaves_nothing(shared: Asking) -> None:
    before = await _count(shared)
    data = sample()

    async def messages() -> AsyncIterator[pb.ImportMemoryRequest]:
        yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header())
        yield pb.ImportMemoryRequest(data=data[:1000])
        await asyncio.sleep(60)

    call = shared.as_operator(shared.memories.ImportMemory, messages())
    await eventually(lambda: _staged(shared))
    call.cancel()
    await eventually(lambda: _idle(shared))
    await _nothing_remains(shared, before)


async def _staged(served: Asking) -> bool:
    return bool(list(served.app.data.staging.iterdir()))


async def test_quotas_hold_for_imports(start: Serve) -> None:
    async with start(max_documents_per_memory=2, max_memories_per_tenant=2) as served:
        found = await refused(_import(served, _archive("one", "two", "three")))
        assert found.reason == "QUOTA_EXCEEDED"
        await _nothing_remains(served, 0)
        await served.create()
        await served.create()
        found = await refused(_import(served, _archive("one")))
        assert found.reason == "QUOTA_EXCEEDED"
        await _nothing_remains(served, 2)


LETTERS = [chr(code) for code in range(0x100, 0x500)]


@pytest.mark.parametrize("what", ["document", "memory"])
async def test_a_deletion_ends_what_is_on_its_way_out(shared: Asking, what: str) -> None:
    memory = await shared.create()
    chance = random.Random(5)
    # Too varied to compress: the archive must not fit the buffers on its way.
    texts = ["".join(chance.choices(LETTERS, k=120_000)) for _ in range(10)]
    for _ in range(10):
        await shared.append(memory.name, *texts)
    call = _export(shared, memory.name, without_blocks=True)
    async for _ in call:
        break
    if what == "document":
        await shared.delete_documents(memory.name, 100)
    else:
        await shared.delete(memory.name)
    expected = {"document": "OFFSET_NOT_AVAILABLE", "memory": "MEMORY_NOT_FOUND"}
    assert (await refused(call)).reason == expected[what]
    assert not list(shared.app.data.staging.iterdir())


async def test_an_import_that_could_not_be_undone_does_not_hold_its_name(shared: Asking) -> None:
    tenant = await shared.app.catalog.get_tenant("default")
    packing = policy(PackingMode.TURN)
    left = await shared.app.catalog.create_memory(
        tenant.uid, "left", "", {}, packing, MemoryState.IMPORTING, None
    )
    memory = await shared.create()
    data = await _exported(shared, memory.name)
    shared.app.importing.add(left.uid)
    assert (await refused(_import(shared, data, memory_id="left"))).reason == "ALREADY_EXISTS"
    shared.app.importing.remove(left.uid)
    assert (await _import(shared, data, memory_id="left")).memory.name == "memories/left"
    assert await shared.app.catalog.memories_in_state(MemoryState.IMPORTING) == []
    assert shared.app.importing == set()


async def test_a_damaged_block_costs_an_export_its_blocks_and_no_text(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "the kettle sings", "the cat sleeps")
    await shared.ready(memory.name)
    row = await shared.row(memory.name)

    def spoil(kind: Kind) -> Callable[[TenantStore], None]:
        def change(transaction: lmdb.Transaction) -> None:
            for key, value in list(transaction.cursor()):
                if bytes(key).hex().startswith(row.uid) and bytes(key)[16] == kind:
                    transaction.put(bytes(key), bytes(value)[:-1] + bytes([bytes(value)[-1] ^ 1]))

        def work(store: TenantStore) -> None:
            assert isinstance(store, LmdbStore)
            store._environment.write(change)

        return work

    await shared.app.stores.run(row.tenant_uid, spoil(Kind.CONTENT))
    reply = await _import(shared, await _exported(shared, memory.name))
    assert (reply.reused_blocks, reply.documents_to_encode) == (0, 2)
    assert await shared.texts(reply.memory.name) == ["the kettle sings", "the cat sleeps"]
    await shared.app.stores.run(row.tenant_uid, spoil(Kind.DOCUMENT))
    assert (await refused(_export(shared, memory.name))).reason == "RECORD_CORRUPT"
    await shared.delete(memory.name)
