"""ForkMemory and RestoreMemory over a socket, with a worker that answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.receipts import METADATA_KEY
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.writes import memory_uid
from storage.keys import Kind, parse_key
from tests.support.answers import Answer, Asking
from tests.support.served import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "Where does Anna live?"
PLACES = ("Graz", "Lisbon", "Oslo")


async def told(shared: Asking, *places: str) -> str:
    """One revision and one document for each place."""
    memory = await shared.create(display_name="Anna's", labels={"kind": "person"})
    for place in places or PLACES:
        await shared.append(memory.name, f"Anna does live in {place}")
    return str(memory.name)


async def ranked(shared: Asking, memory: str, **fields: Any) -> list[tuple[int, float]]:
    request = pb.RetrieveRequest(memory=memory, question=QUESTION, view=resources.BASIC, **fields)
    reply = await shared.as_operator(shared.memories.Retrieve, request)
    return [(document.number, document.score) for document in reply.documents]


def given(answer: Answer) -> tuple[str, list[int]]:
    return answer.text, answer.cited


async def sound(shared: Asking, *memories: str) -> None:
    for memory in memories:
        assert await shared.problems(await shared.row(memory)) == []


async def test_a_fork_answers_as_its_parent_and_nothing_was_encoded(shared: Asking) -> None:
    parent = await told(shared)
    await shared.ready(parent)
    tenant = (await shared.row(parent)).tenant_uid
    before = await shared.app.catalog.usage(tenant)
    reply = await shared.fork(parent, request_id="same")
    fork = reply.memory
    assert reply.documents_missing == 0
    assert fork.uid != (await shared.get(parent)).uid
    assert (fork.revision, fork.document_count, fork.display_name) == (3, 3, "Anna's")
    assert fork.labels == {"kind": "person"}
    assert (fork.forked_from_uid, fork.forked_revision) == ((await shared.get(parent)).uid, 3)
    assert [e.state for e in fork.encodings] == [resources.Encoding.READY]
    assert await shared.fork(parent, request_id="same") == reply
    assert await shared.texts(fork.name) == await shared.texts(parent)
    assert await ranked(shared, fork.name) == await ranked(shared, parent)
    assert given(await shared.ask(fork.name, QUESTION)) == given(await shared.ask(parent, QUESTION))
    assert (await shared.app.catalog.usage(tenant)).documents == before.documents + 3
    # Nothing of a document lies under the fork.
    uid = memory_uid(await shared.row(fork.name))
    raw = await shared.app.stores.read(
        tenant,
        lambda store: [parse_key(key) for key, _ in store.iter_raw()],  # type: ignore[attr-defined]  # LMDB's
    )
    kinds = {key.kind for key in raw if key.memory == uid}
    assert kinds == {Kind.ENCODING, Kind.KEYS, Kind.INHERITED}
    await sound(shared, parent, fork.name)


async def test_the_two_go_their_own_ways(shared: Asking) -> None:
    parent = await told(shared)
    fork = (await shared.fork(parent)).memory.name
    await shared.append(parent, "Anna does live in Turin")
    await shared.append(fork, "Anna does live in Bergen")
    await shared.delete_documents(parent, 1)
    await shared.delete_documents(fork, 2)
    assert await shared.texts(parent) == [
        f"Anna does live in {p}" for p in ("Lisbon", "Oslo", "Turin")
    ]
    assert await shared.texts(fork) == [
        f"Anna does live in {p}" for p in ("Graz", "Oslo", "Bergen")
    ]
    assert {number for number, _ in await ranked(shared, parent)} == {2, 3, 4}
    assert {number for number, _ in await ranked(shared, fork)} == {1, 3, 4}
    assert "Lisbon" not in (await shared.ask(fork, "Anna live Lisbon")).text
    assert (await shared.get(fork)).revision == 5
    await shared.ready(parent)
    await shared.ready(fork)
    await sound(shared, parent, fork)


async def test_deleting_the_parent_leaves_the_fork_whole(shared: Asking) -> None:
    parent = await told(shared)
    fork = (await shared.fork(parent)).memory.name
    second = (await shared.fork(fork)).memory.name
    expected = await ranked(shared, fork), given(await shared.ask(fork, QUESTION))
    keys = shared.app.keys.tenant((await shared.row(parent)).tenant_uid)
    uid = memory_uid(await shared.row(parent))
    await shared.delete(parent)
    await shared.delete(fork)
    assert keys is not None and uid not in keys.memories()
    assert (await ranked(shared, second), given(await shared.ask(second, QUESTION))) == expected
    await shared.append(second, "Anna does live in Bergen")
    await shared.ready(second)
    assert len(await ranked(shared, second)) == 4
    await sound(shared, second)
    row = await shared.row(second)
    await shared.delete(second)
    left = await shared.app.stores.read(row.tenant_uid, lambda store: store.memories())
    assert not {uid, memory_uid(row)}.intersection(left)


async def test_a_fork_of_the_past_is_the_past(shared: Asking) -> None:
    parent = await told(shared)
    then = [await ranked(shared, parent, at_revision=revision) for revision in (1, 2)]
    answers = [given(await shared.ask(parent, QUESTION, at_revision=r)) for r in (1, 2)]
    for revision in (1, 2):
        reply = await shared.fork(parent, at_revision=revision)
        fork = reply.memory.name
        assert (reply.memory.revision, reply.memory.document_count) == (revision, revision)
        assert await ranked(shared, fork) == then[revision - 1]
        assert given(await shared.ask(fork, QUESTION)) == answers[revision - 1]
        await sound(shared, fork)
    second = Timestamp()
    listed = await shared.as_operator(
        shared.memories.ListRevisions, pb.ListRevisionsRequest(parent=parent)
    )
    second.CopyFrom(listed.revisions[1].create_time)
    assert (await shared.fork(parent, at_time=second)).memory.document_count == 2


async def test_what_was_deleted_since_is_missing_and_said_so(shared: Asking) -> None:
    parent = await told(shared)
    await shared.delete_documents(parent, 1)
    reply = await shared.fork(parent, at_revision=2)
    assert reply.documents_missing == 1
    assert await shared.texts(reply.memory.name) == ["Anna does live in Lisbon"]
    assert (await shared.fork(parent)).documents_missing == 0
    # A fork's own past begins with it.
    fork = reply.memory.name
    request = pb.ListDocumentsRequest(parent=fork, at_revision=1)
    answer = await refused(shared.as_operator(shared.memories.ListDocuments, request))
    assert (answer.reason, answer.field) == ("FIELD_INVALID", "at_revision")
    assert {number for number, _ in await ranked(shared, fork, at_revision=2)} == {2}
    assert (await refused(shared.restore(fork, 1))).field == "revision"


async def test_a_fork_of_what_waits_is_encoded_once(shared: Asking) -> None:
    parent = await told(shared, "Graz")
    fork = (await shared.fork(parent)).memory.name
    for memory in (parent, fork):
        await shared.ready(memory)
        assert {number for number, _ in await ranked(shared, memory)} == {1}
    await sound(shared, parent, fork)


async def test_a_damaged_shared_block_is_made_again_for_all(shared: Asking) -> None:
    parent = await told(shared)
    await shared.ready(parent)
    fork = (await shared.fork(parent)).memory.name
    assert len(await ranked(shared, parent)) == 3
    row = await shared.row(fork)
    model = await shared.app.catalog.get_model(row.default_model_id)
    await shared.app.encoding.rebuild(row, model, [2])
    for memory in (fork, parent):
        await shared.ready(memory)
        assert len(await ranked(shared, memory)) == 3
    await sound(shared, parent, fork)


async def test_detaching_a_model_is_each_memorys_own(shared: Asking) -> None:
    parent = await told(shared)
    await shared.ready(parent)
    fork = (await shared.fork(parent)).memory.name
    row = await shared.row(parent)
    model = await shared.app.catalog.get_model(row.default_model_id)
    encoding = bytes.fromhex(model.identity)[:16]
    await shared.app.stores.run(
        row.tenant_uid,
        lambda store: store.delete_encoding(memory_uid(row), encoding),  # type: ignore[arg-type]  # an EncodingId
    )
    assert len(await ranked(shared, fork)) == 3


async def test_receipts_name_what_others_still_show(shared: Asking) -> None:
    parent = await told(shared)
    await shared.ready(parent)
    fork = (await shared.fork(parent)).memory.name

    async def receipt(call: Any) -> dict[str, Any]:
        await call
        (found,) = [value for key, value in await call.trailing_metadata() if key == METADATA_KEY]
        return dict(json.loads(json.loads(found)["statement"]))

    def delete(memory: str, *numbers: int) -> Any:
        names = [f"{memory}/documents/{number}" for number in numbers]
        request = pb.DeleteDocumentsRequest(parent=memory, names=names)
        return shared.as_operator(shared.memories.DeleteDocuments, request)

    first = await receipt(delete(parent, 1, 2))
    assert (first["documents"], first["texts"], first["shared"]) == ("1-2", 0, "1-2")
    second = await receipt(delete(fork, 2))
    assert (second["texts"], second["blocks"], second["shared"]) == (1, 1, "")
    request = pb.DeleteMemoryRequest(name=parent)
    whole = await receipt(shared.as_operator(shared.memories.DeleteMemory, request))
    assert (whole["documents"], whole["texts"], whole["shared"]) == (None, 0, "3")
    tenant = admin.ListDeletionReceiptsRequest(parent="tenants/default", page_size=3)
    listed = await shared.as_operator(shared.admin.ListDeletionReceipts, tenant)
    assert [one.shared for one in listed.deletion_receipts] == ["3", "", "1-2"]
    assert len(await shared.texts(fork)) == 2


async def test_what_cannot_be_forked_is_refused_and_leaves_nothing(shared: Asking) -> None:
    parent = await told(shared)
    taken = await told(shared)
    row = await shared.row(parent)

    async def held() -> tuple[list[bytes], list[bytes]]:
        keys = shared.app.keys.tenant(row.tenant_uid)
        assert keys is not None
        return await shared.app.stores.read(row.tenant_uid, lambda s: list(s.memories())), list(
            keys.memories()
        )

    before = await held()
    for fields, reason, field in (
        ({"memory_id": taken.removeprefix("memories/")}, "ALREADY_EXISTS", "memory_id"),
        ({"memory_id": "No!"}, "FIELD_INVALID", "memory_id"),
        ({"display_name": "x" * 257}, "TEXT_TOO_LONG", "display_name"),
        ({"at_revision": -1}, "FIELD_INVALID", "at_revision"),
        ({"at_revision": 4}, "REVISION_NOT_REACHED", "at_revision"),
        ({"at_revision": 1, "at_time": Timestamp(seconds=1)}, "FIELD_INVALID", "at_time"),
        ({"request_id": "no spaces"}, "FIELD_INVALID", "request_id"),
    ):
        answer = await refused(shared.fork(parent, **fields))
        assert (answer.reason, answer.field) == (reason, field)
    answer = await refused(shared.fork("memories/never-was"))
    assert (answer.reason, answer.field) == ("MEMORY_NOT_FOUND", "name")
    await shared.fork(parent, request_id="one")
    answer = await refused(shared.fork(parent, request_id="one", display_name="other"))
    assert answer.reason == "REQUEST_ID_REUSED"
    after = await held()
    assert [len(part) for part in after] == [len(part) + 1 for part in before]


async def test_restoring_takes_back_what_came_since(shared: Asking) -> None:
    memory = await told(shared, "Graz", "Lisbon", "Oslo", "Turin")
    then = await ranked(shared, memory, at_revision=2)
    answer = given(await shared.ask(memory, QUESTION, at_revision=2))
    kept = (await shared.fork(memory)).memory.name
    reply = await shared.restore(memory, 2, request_id="back")
    assert (reply.revision, reply.documents_removed, reply.documents_missing) == (5, 2, 0)
    assert await shared.texts(memory) == ["Anna does live in Graz", "Anna does live in Lisbon"]
    assert await ranked(shared, memory) == then
    assert given(await shared.ask(memory, QUESTION)) == answer
    await shared.append(memory, "Anna does live in Bergen")
    assert await shared.restore(memory, 2, request_id="back") == reply
    assert len(await shared.texts(memory)) == 3, "a retry deletes nothing more"
    assert len(await shared.texts(kept)) == 4, "the fork keeps it all"
    await shared.ready(memory)
    await sound(shared, memory, kept)


async def test_what_was_deleted_does_not_come_back(shared: Asking) -> None:
    memory = await told(shared)
    await shared.delete_documents(memory, 1)
    reply = await shared.restore(memory, 2)
    assert (reply.revision, reply.documents_removed, reply.documents_missing) == (5, 1, 1)
    assert await shared.texts(memory) == ["Anna does live in Lisbon"]
    again = await shared.restore(memory, 5)
    assert (again.revision, again.documents_removed, again.documents_missing) == (6, 0, 0)


async def test_restoring_is_refused_cleanly(shared: Asking) -> None:
    memory = await told(shared)
    for revision, reason in (
        (0, "FIELD_INVALID"),
        (-1, "FIELD_INVALID"),
        (4, "REVISION_NOT_REACHED"),
    ):
        answer = await refused(shared.restore(memory, revision))
        assert (answer.reason, answer.field) == (reason, "revision")
    assert (await refused(shared.restore("memories/never-was", 1))).reason == "MEMORY_NOT_FOUND"
    assert (await shared.get(memory)).revision == 3


async def test_a_fork_is_exported_and_imported_whole(shared: Asking) -> None:
    parent = await told(shared)
    await shared.ready(parent)
    fork = (await shared.fork(parent)).memory.name
    await shared.append(fork, "Anna does live in Bergen")
    await shared.delete_documents(fork, 1)
    await shared.ready(fork)
    await shared.delete(parent)
    export = shared.as_operator(shared.memories.ExportMemory, pb.ExportMemoryRequest(name=fork))
    data = b"".join([reply.data async for reply in export])

    def messages() -> Any:
        yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header())
        yield pb.ImportMemoryRequest(data=data)

    reply = await shared.as_operator(shared.memories.ImportMemory, messages())
    assert (reply.reused_blocks, reply.documents_to_encode) == (3, 0)
    assert await shared.texts(reply.memory.name) == await shared.texts(fork)
    assert await ranked(shared, reply.memory.name) == await ranked(shared, fork)
