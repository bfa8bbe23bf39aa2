"""Documents that are deleted and still in the store: for a moment, or as long as a disk is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memsvc.api.asking import _ranges
from memsvc.clock import SteadyClock
from memsvc.housekeeping import keep_house_once
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.writes import memory_uid
from model_adapter.v1 import model_adapter_pb2 as worker_pb
from storage.catalog import CatalogUnavailableError
from storage.failpoints import Failpoint, armed
from tests.service.test_deletion import receipt_of, statement
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, asking, worker_apart
from tests.support.bad_disk import Held, full_disk
from tests.support.broken_workers import Unheeding, worker_behind
from tests.support.served import Folder, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = ("Anna saw a heron", "the heron code is 7731", "Bob has a heron", "the heron of Lisbon")
#: Asks for document 2, which is the one that is deleted.
QUESTION = "heron code 7731"


def deletion(served: Asking, memory: str, *numbers: int, request_id: str = "") -> Any:
    names = [f"{memory}/documents/{number}" for number in numbers]
    request = pb.DeleteDocumentsRequest(parent=memory, names=names, request_id=request_id)
    return served.as_operator(served.memories.DeleteDocuments, request)


async def filled(served: Asking) -> str:
    memory = await served.create()
    await served.append(memory.name, *TEXTS)
    await served.ready(memory.name)
    return str(memory.name)


async def ranked(served: Asking, memory: str, question: str = QUESTION, **fields: Any) -> set[int]:
    request = pb.RetrieveRequest(
        memory=memory, question=question, view=resources.BASIC, limit=10, **fields
    )
    reply = await served.as_operator(served.memories.Retrieve, request)
    return {document.number for document in reply.documents}


async def nothing_shows(served: Asking, memory: str, *, revision: int = 1) -> None:
    """Document 2 is in no answer, list, archive or fork; the others are, as of then too."""
    moments: tuple[dict[str, Any], ...] = ({}, {"at_revision": revision})
    for then in moments:
        for weight in (0.0, 0.5):
            assert await ranked(served, memory, lexical_weight=weight, **then) == {1, 3, 4}
        user = resources.DocumentFilter(roles=[resources.USER])
        assert await ranked(served, memory, filter=user, **then) == {1, 3, 4}
        answer = await served.ask(memory, QUESTION, **then)
        assert "7731" not in answer.text and 2 not in answer.cited
        routed = [document.number for routing in answer.routings for document in routing.documents]
        assert 2 not in routed
        assert answer.usage is not None and answer.usage.routed_documents == 3
    assert await served.texts(memory) == [TEXTS[0], *TEXTS[2:]]
    get = pb.GetDocumentRequest(name=f"{memory}/documents/2")
    assert (await refused(served.as_operator(served.memories.GetDocument, get))).reason == (
        "DOCUMENT_NOT_FOUND"
    )


async def in_store(served: Asking, memory: str) -> list[int]:
    row = await served.row(memory)
    return await served.app.stores.read(
        row.tenant_uid, lambda store: store.document_numbers(memory_uid(row))
    )


async def nothing_is_owed(served: Asking, memory: str) -> None:
    row = await served.row(memory)
    assert await in_store(served, memory) == [1, 3, 4]
    assert await served.blocks(row) == [1, 3, 4]
    assert await served.app.catalog.removed_numbers(row.uid) == []
    assert row.uid not in served.app.deletions.owed


async def test_nothing_shows_while_the_purge_is_on_its_way(shared: Asking) -> None:
    memory = await filled(shared)
    async with Held().during(deletion(shared, memory, 2)) as deleting:
        await nothing_shows(shared, memory)
        assert not deleting.done()
    await nothing_is_owed(shared, memory)
    await nothing_shows(shared, memory)


async def test_a_deletion_that_cannot_purge_says_so_and_a_repeat_finishes_it(
    shared: Asking,
) -> None:
    memory = await filled(shared)
    assert "7731" in (await shared.ask(memory, QUESTION)).text
    with full_disk():
        for _ in range(2):
            found = await refused(deletion(shared, memory, 2, request_id="r2"))
            assert (found.code, found.reason) == ("UNAVAILABLE", "DELETION_UNFINISHED")
            assert found.retry_s
        await nothing_shows(shared, memory)
    assert await in_store(shared, memory) == [1, 2, 3, 4], "the disk was full"
    await nothing_shows(shared, memory)
    receipt = await receipt_of(call := deletion(shared, memory, 2, request_id="r2"))
    assert (await call).revision == 2
    assert statement(shared, receipt)["documents"] == "2"
    await nothing_is_owed(shared, memory)
    await nothing_shows(shared, memory)
    assert await receipt_of(deletion(shared, memory, 2, request_id="r2")) is None


async def test_housekeeping_destroys_what_nobody_asked_for_again(shared: Asking) -> None:
    first, second = await filled(shared), await filled(shared)
    with full_disk():
        for memory in (first, second):
            await refused(deletion(shared, memory, 2))
    before = await shared.row(first)
    await keep_house_once(shared.app, SteadyClock())
    for memory in (first, second):
        await nothing_is_owed(shared, memory)
        await nothing_shows(shared, memory)
    assert await shared.row(first) == before, "it is no second deletion"


async def test_forks_archives_and_later_writes_of_a_memory_that_owes(shared: Asking) -> None:
    memory = await filled(shared)
    with full_disk():
        found = await refused(deletion(shared, memory, 2, request_id="r4"))
        assert found.reason == "DELETION_UNFINISHED"
    fork = (await shared.fork(memory)).memory.name
    archive = await exported(shared, memory)
    await nothing_shows(shared, fork, revision=2)
    assert b"7731" not in archive
    assert await in_store(shared, fork) == [1, 3, 4]
    await shared.append(memory, "the heron code was 7731 once")
    assert await ranked(shared, memory) == {1, 3, 4, 5}
    await deletion(shared, memory, 5)
    await nothing_is_owed(shared, memory)
    assert (await deletion(shared, memory, 2, request_id="r4")).revision == 2
    await nothing_shows(shared, fork, revision=2)


async def test_taking_a_memory_back_owes_alike(shared: Asking) -> None:
    memory = await filled(shared)
    await shared.append(memory, "the newest heron code is 8842", "a heron 9953")
    await shared.ready(memory)
    with full_disk():
        found = await refused(shared.restore(memory, 1, request_id="back"))
        assert found.reason == "DELETION_UNFINISHED"
    assert await ranked(shared, memory, "newest heron code 8842") == {1, 2, 3, 4}
    assert "8842" not in (await shared.ask(memory, "newest heron code 8842")).text
    reply = await shared.restore(memory, 1, request_id="back")
    assert (reply.revision, reply.documents_removed) == (3, 2)
    assert await in_store(shared, memory) == [1, 2, 3, 4]
    assert (await shared.row(memory)).uid not in shared.app.deletions.owed


async def test_a_commit_of_which_nobody_knows(shared: Asking) -> None:
    """The connection to the catalog breaks as it commits."""
    memory = await filled(shared)

    def break_off(point: Failpoint) -> None:
        if point is Failpoint.DELETE_COMMITTED:
            raise CatalogUnavailableError("the connection broke")

    with armed(break_off):
        found = await refused(deletion(shared, memory, 2, request_id="r6"))
    assert found.reason == "CATALOG_UNAVAILABLE"
    await nothing_shows(shared, memory)
    assert (await deletion(shared, memory, 2, request_id="r6")).revision == 2
    await nothing_is_owed(shared, memory)


async def test_a_deletion_that_is_refused_owes_nothing(shared: Asking) -> None:
    memory = await filled(shared)
    assert (await refused(deletion(shared, memory, 2, 9))).reason == "DOCUMENT_NOT_FOUND"
    assert (await shared.row(memory)).uid not in shared.app.deletions.owed
    assert await ranked(shared, memory) == {1, 2, 3, 4}


async def test_an_answer_under_way_says_nothing_of_what_is_deleted_under_it(start: Serve) -> None:
    async with start(worker_model="fake:step_ms=20") as served:
        memory = await served.create()
        await served.append(memory.name, *TEXTS, " ".join(f"heron{n}" for n in range(150)))
        await served.ready(memory.name)
        events = served.stream(
            memory.name, "heron1 heron2", options=pb.GenerationOptions(max_answer_tokens=150)
        )
        assert (await anext(aiter(events))).WhichOneof("event") == "routing"
        async with Held().during(deletion(served, memory.name, 5)) as deleting:
            found = await refused(events)
            assert found.reason == "WORKER_UNAVAILABLE"
            assert not deleting.done(), "before anything was evicted"


async def test_a_worker_that_does_not_know_is_not_asked(folder: Folder, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder.copy(data)
    async with (
        worker_apart(data, tmp_path / "w") as worker,
        worker_behind(Unheeding, worker.address, tmp_path) as address,
        asking(folder, data, worker_address=address) as served,
    ):
        memory = await filled(served)
        with full_disk():
            await refused(deletion(served, memory, 2, request_id="r9"))
        for call in (served.stream(memory, QUESTION), ranked(served, memory)):
            found = await refused(call)
            assert found.reason == "WORKER_UNAVAILABLE" and found.retry_s
        await deletion(served, memory, 2, request_id="r9")
        await nothing_shows(served, memory)


async def test_a_worker_is_told_in_ranges(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, *(f"heron number {n}" for n in range(1, 10)))
    await shared.ready(memory.name)
    with full_disk():
        await refused(deletion(shared, memory.name, 2, 3, 4, 7, 9))
    assert await ranked(shared, memory.name, "heron number") == {1, 5, 6, 8}
    assert _ranges([2, 3, 4, 7, 9]) == [
        worker_pb.NumberRange(first=2, last=4),
        worker_pb.NumberRange(first=7, last=7),
        worker_pb.NumberRange(first=9, last=9),
    ]


async def exported(served: Asking, memory: str) -> bytes:
    call = served.as_operator(served.memories.ExportMemory, pb.ExportMemoryRequest(name=memory))
    return b"".join([reply.data async for reply in call])
