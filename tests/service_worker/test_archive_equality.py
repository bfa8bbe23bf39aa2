"""Export, wipe, import elsewhere: what comes back is what there was, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.layout import KVBlock
from storage.store import EncodingId, MemoryUid, TenantStore
from tests.service_worker.test_archive import _exported, _import
from tests.service_worker.test_attaching import attach
from tests.support.answers import Asking, asking, eventually, worker_apart
from tests.support.blocks import same_block
from tests.support.served import Folder, make_folder

NEW_SPEC = "fake:name=new,pool_tokens=4"


async def documents(served: Asking, memory: str, **fields: Any) -> list[resources.Document]:
    """All of them in full, without the memory in their names."""
    request = pb.ListDocumentsRequest(parent=memory, page_size=100, view=resources.FULL, **fields)
    page = await served.as_operator(served.memories.ListDocuments, request)
    assert not page.next_page_token
    for document in page.documents:
        document.name = document.name.removeprefix(memory)
    return list(page.documents)


async def revisions(served: Asking, memory: str) -> list[Any]:
    page = await served.as_operator(
        served.memories.ListRevisions, pb.ListRevisionsRequest(parent=memory, page_size=1000)
    )
    return list(page.revisions)


async def blocks(served: Asking, memory: str) -> dict[str, list[KVBlock]]:
    """By model: every block as the store gives it back."""
    row = await served.row(memory)
    found = {}
    for encoding in await served.app.catalog.list_encodings(row.uid):
        model = await served.app.catalog.get_model(encoding.model_id)
        encoding_id = EncodingId(bytes.fromhex(model.identity)[:16])
        place = MemoryUid(bytes.fromhex(row.uid)), encoding_id, model.layout

        def read(store: TenantStore, place: Any = place) -> list[KVBlock]:
            return [
                KVBlock(r.number, r.tokens, r.routing_key_LCE, c.key_LCE, c.value_LCE)
                for r, c in zip(store.iter_routing(*place), store.iter_content(*place), strict=True)
            ]

        found[model.model_id] = await served.app.stores.read(row.tenant_uid, read)
    return found


async def past(served: Asking, memory: str, revision: int) -> tuple[str, list[int]]:
    answer = await served.ask(memory, "who repaired the boiler", at_revision=revision)
    return answer.text, answer.cited


def put(memory: str) -> Iterator[pb.PutDocumentsRequest]:
    kind = pb.PutDocumentsRequest
    yield kind(header=kind.Header(memory=memory))
    yield kind(document_start=kind.DocumentStart(title="manual", metadata={"page": "3"}))
    yield kind(text="the boiler must be repaired by Maja")
    yield kind(end=kind.End(documents=1))


async def lived(served: Asking) -> str:
    """A memory with a past: conversation, a text, deletions, a write that left nothing."""
    memory = await served.create("origin", display_name="Origin", labels={"team": "blue"})
    await served.append(memory.name, "Olga repaired the boiler", "the cat sleeps")
    await served.append(memory.name, *(f"note {n} of boilers" for n in range(30)))
    await served.as_operator(served.memories.PutDocuments, put(memory.name))
    await served.append(memory.name, "never mind")
    await served.delete_documents(memory.name, 34)
    await served.append(memory.name, "Pavel repaired the boiler last")
    await served.delete_documents(memory.name, 1, 7)
    await served.ready(memory.name)
    return memory.name


async def test_all_of_a_memory_comes_back_on_another_data_folder(
    folder: Folder, tmp_path: Path
) -> None:
    async with asking(folder, tmp_path / "a") as served:
        name = await lived(served)
        last = (await served.get(name)).revision
        before = await told(served, name, last)
        data = await _exported(served, name)
        await served.delete(name)
    elsewhere = await asyncio.to_thread(make_folder, tmp_path / "b")
    async with asking(elsewhere, tmp_path / "b") as served:
        await served.worker_pid()
        reply = await _import(served, data, memory_id="again", request_id="once")
        assert reply.memory.revision == last == 7
        assert (reply.reused_blocks, reply.documents_to_encode) == (32, 0)
        assert await told(served, reply.memory.name, last) == before
        assert await served.problems(await served.row(reply.memory.name)) == []
        # The recorded reply says the same, and life goes on behind the last revision.
        repeated = await _import(served, data, memory_id="again", request_id="once")
        assert repeated.memory.revision == last
        written = await served.append(reply.memory.name, "new")
        assert written.revision == last + 1
        assert written.documents == [f"{reply.memory.name}/documents/36"]
        # An archive of the import tells the same story.
        assert await _exported(served, reply.memory.name)


class Same(list[KVBlock]):
    """Blocks that are compared bit for bit."""

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, list)
        return all(same_block(a, b) for a, b in zip(self, other, strict=True))

    __hash__ = None


async def told(served: Asking, memory: str, last: int) -> list[object]:
    """What can be told of a memory, then and now."""
    found = await served.get(memory)
    return [
        (found.display_name, dict(found.labels), found.packing, found.revision),
        (found.document_count, found.text_bytes),
        await documents(served, memory),
        await revisions(served, memory),
        [await documents(served, memory, at_revision=n) for n in range(1, last + 1)],
        [await past(served, memory, n) for n in range(1, last + 1)],
        {model: Same(held) for model, held in (await blocks(served, memory)).items()},
    ]


@asynccontextmanager
async def models(
    folder: Folder, root: Path, *specs: str, **settings: object
) -> AsyncIterator[Asking]:
    """A server with a worker of each; the first is the default."""
    data = root / "data"
    await asyncio.to_thread(root.mkdir, exist_ok=True)
    async with AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(worker_apart(data, root / str(number), spec))
            for number, spec in enumerate(specs)
        ]
        addresses = ",".join(worker.address for worker in workers)
        served = await stack.enter_async_context(
            asking(folder, data, worker_address=addresses, **settings)
        )

        async def all_seen() -> bool:
            return len(served.app.workers.served()) == len(specs)

        await eventually(all_seen)
        yield served


async def encoded(served: Asking, memory: str) -> dict[str, int] | None:
    """Documents encoded by model, once nothing waits."""
    found = (await served.get(memory)).encodings
    if any(encoding.state != resources.Encoding.READY for encoding in found):
        return None
    return {one.model.removeprefix("models/"): one.encoded_documents for one in found}


async def test_blocks_are_reused_by_identity_and_the_rest_is_encoded(
    folder: Folder, tmp_path: Path
) -> None:
    texts = [f"boiler number {n}" for n in range(12)]
    async with models(folder, tmp_path / "both", "fake", NEW_SPEC) as served:
        memory = await served.create("origin")
        await served.append(memory.name, *texts)
        await attach(served, memory.name)
        assert await eventually(lambda: encoded(served, memory.name)) == {
            "fake": 12,
            "fake-new": 12,
        }
        before = await blocks(served, memory.name)
        data = await _exported(served, memory.name)
        known = await served.app.catalog.get_model("fake-new")
    # Elsewhere the second model was known once, under another name; a third one answers.
    elsewhere = await asyncio.to_thread(make_folder, tmp_path / "other" / "data")
    async with models(elsewhere, tmp_path / "other", "fake:name=third,pool_tokens=2") as served:
        await served.app.catalog.upsert_model(replace(known, model_id="renamed", default=False))
        reply = await _import(served, data)
        assert (reply.reused_blocks, reply.documents_to_encode) == (12, 12)
        assert await eventually(lambda: encoded(served, reply.memory.name)) == {
            "renamed": 12,
            "fake-third": 12,
        }
        after = await blocks(served, reply.memory.name)
        assert Same(before["fake-new"]) == after["renamed"]
        assert [block.number for block in after["fake-third"]] == list(range(1, 13))
        answer = await served.ask(reply.memory.name, "boiler number 7")
        assert answer.cited == [8]
