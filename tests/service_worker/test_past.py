"""The memory as it was: listed, ranked and asked as of a revision or a time."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.support.answers import Asking
from tests.support.served import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "Where does Anna live?"


async def told(shared: Asking) -> str:
    """Revision 1: Graz, 2: Lisbon, 3: Oslo."""
    memory = await shared.create()
    for place in ("Graz", "Lisbon", "Oslo"):
        await shared.append(memory.name, f"Anna does live in {place}")
    return memory.name


async def revisions(shared: Asking, memory: str, **fields: Any) -> pb.ListRevisionsResponse:
    request = pb.ListRevisionsRequest(parent=memory, **fields)
    found: pb.ListRevisionsResponse = await shared.as_operator(
        shared.memories.ListRevisions, request
    )
    return found


async def numbers(shared: Asking, memory: str, **fields: Any) -> list[int]:
    request = pb.ListDocumentsRequest(parent=memory, page_size=2, **fields)
    found: list[int] = []
    while True:
        page = await shared.as_operator(shared.memories.ListDocuments, request)
        found += [document.number for document in page.documents]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def ranked(shared: Asking, memory: str, **fields: Any) -> tuple[int, set[int]]:
    request = pb.RetrieveRequest(memory=memory, question=QUESTION, view=resources.BASIC, **fields)
    reply = await shared.as_operator(shared.memories.Retrieve, request)
    return reply.revision, {document.number for document in reply.documents}


async def test_what_each_write_made(shared: Asking) -> None:
    memory = await told(shared)
    await shared.delete_documents(memory, 2)
    listed = (await revisions(shared, memory)).revisions
    assert [(r.revision, r.documents_added, r.documents_removed) for r in listed] == [
        (4, 0, 1),
        (3, 1, 0),
        (2, 1, 0),
        (1, 1, 0),
    ]
    first = await revisions(shared, memory, page_size=3)
    rest = await revisions(shared, memory, page_size=3, page_token=first.next_page_token)
    assert [*first.revisions, *rest.revisions] == list(listed) and not rest.next_page_token
    assert not (await revisions(shared, (await shared.create()).name)).revisions


async def test_as_of_a_revision(shared: Asking) -> None:
    memory = await told(shared)
    for revision in (1, 2, 3):
        upto = list(range(1, revision + 1))
        assert await numbers(shared, memory, at_revision=revision) == upto
        assert await ranked(shared, memory, at_revision=revision) == (revision, set(upto))
        answer = await shared.ask(memory, QUESTION, at_revision=revision)
        assert answer.done is not None and answer.done.revision == revision
        assert answer.usage is not None and answer.usage.routed_documents == revision
    assert await numbers(shared, memory) == [1, 2, 3]


async def test_as_of_a_time(shared: Asking) -> None:
    memory = await told(shared)
    for made in (await revisions(shared, memory)).revisions:
        at = made.create_time
        assert await ranked(shared, memory, at_time=at) == (
            made.revision,
            set(range(1, made.revision + 1)),
        )
        assert len(await numbers(shared, memory, at_time=at)) == made.revision
    long_ago = Timestamp(seconds=1_000_000_000)
    assert await ranked(shared, memory, at_time=long_ago) == (0, set())
    assert await numbers(shared, memory, at_time=long_ago) == []
    answer = await shared.ask(memory, QUESTION, at_time=long_ago)
    assert answer.cited == [] and answer.done is not None and answer.done.revision == 0
    future = Timestamp(seconds=4_000_000_000)
    assert (await ranked(shared, memory, at_time=future))[0] == 3


async def test_the_answer_of_then_is_given_again(shared: Asking) -> None:
    memory = (await shared.create()).name
    await shared.append(memory, "Anna does live in Graz")
    then = await shared.ask(memory, QUESTION)
    await shared.append(memory, "Anna does live in Lisbon now, Anna says: live, live")
    assert (await shared.ask(memory, QUESTION)).text != then.text
    again = await shared.ask(memory, QUESTION, at_revision=1)
    assert (again.text, again.cited) == (then.text, then.cited)


async def test_what_was_deleted_stays_deleted(shared: Asking) -> None:
    memory = await told(shared)
    await shared.delete_documents(memory, 2)
    assert await numbers(shared, memory, at_revision=3) == [1, 3]
    assert await ranked(shared, memory, at_revision=2) == (2, {1})
    assert "Lisbon" not in (await shared.ask(memory, QUESTION, at_revision=2)).text


async def test_what_is_refused(shared: Asking) -> None:
    memory = await told(shared)
    now = Timestamp(seconds=1_700_000_000)
    for fields, reason, field in (
        ({"at_revision": 4}, "REVISION_NOT_REACHED", "at_revision"),
        ({"at_revision": -1}, "FIELD_INVALID", "at_revision"),
        ({"at_revision": 1, "at_time": now}, "FIELD_INVALID", "at_time"),
        ({"at_time": Timestamp(seconds=-(10**12))}, "FIELD_INVALID", "at_time"),
    ):
        found = await refused(shared.stream(memory, QUESTION, **fields))
        assert (found.reason, found.field) == (reason, field)
        found = await refused(numbers(shared, memory, **fields))
        assert (found.reason, found.field) == (reason, field)
    found = await refused(shared.stream(memory, QUESTION, at_revision=1, at_least_revision=2))
    assert (found.reason, found.field) == ("FIELD_INVALID", "at_least_revision")


async def test_a_page_token_belongs_to_its_moment(shared: Asking) -> None:
    memory = await told(shared)
    request = pb.ListDocumentsRequest(parent=memory, page_size=1, at_revision=2)
    page = await shared.as_operator(shared.memories.ListDocuments, request)
    request.at_revision, request.page_token = 3, page.next_page_token
    found = await refused(shared.as_operator(shared.memories.ListDocuments, request))
    assert found.reason == "PAGE_TOKEN_INVALID"
