"""Filters over the wire: what may be chosen, listed, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from memsvc.api import sources
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from model_adapter.fake import NOTHING_FOUND
from tests.support.answers import Asking, asking, worker_apart
from tests.support.broken_workers import Unaware, worker_behind
from tests.support.served import Folder, refused

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "Where does Anna live now?"
Filter = resources.DocumentFilter
UNKNOWN = cast(resources.Role.ValueType, 9)


def day(number: int) -> Timestamp:
    return Timestamp(seconds=1_700_000_000 + number * 86_400)


async def told(shared: Asking, *, packing: resources.PackingPolicy | None = None) -> str:
    """Documents 1 to 6: of days 1 to 6, Anna's and Bob's in turns, the last an assistant's."""
    memory = await shared.create(packing=packing)
    turns = [
        resources.Turn(
            role=resources.USER if n < 6 else resources.ASSISTANT,
            text=f"Anna does live in town {n}",
            occurred_at=day(n),
            speaker=("Anna" if n % 2 else "Bob") if n < 6 else "",
            metadata={"week": "first" if n < 4 else "second"},
        )
        for n in range(1, 7)
    ]
    for one in turns if packing is None else ():
        request = pb.AppendTurnsRequest(memory=memory.name, turns=[one])
        await shared.as_operator(shared.memories.AppendTurns, request)
    if packing is not None:
        request = pb.AppendTurnsRequest(memory=memory.name, turns=turns)
        await shared.as_operator(shared.memories.AppendTurns, request)
    return memory.name


async def listed(shared: Asking, memory: str, **fields: Any) -> list[int]:
    request = pb.ListDocumentsRequest(parent=memory, **fields)
    found: list[int] = []
    while True:
        page = await shared.as_operator(shared.memories.ListDocuments, request)
        found += [document.number for document in page.documents]
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def ranked(shared: Asking, memory: str, **fields: Any) -> list[int]:
    request = pb.RetrieveRequest(memory=memory, question=QUESTION, view=resources.BASIC, **fields)
    reply = await shared.as_operator(shared.memories.Retrieve, request)
    return [document.number for document in reply.documents]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Filter(), [1, 2, 3, 4, 5, 6]),
        (Filter(occurred_from=day(3)), [3, 4, 5, 6]),
        (Filter(occurred_from=day(2), occurred_before=day(4)), [2, 3]),
        (Filter(speakers=["Anna"]), [1, 3, 5]),
        (Filter(roles=[resources.ASSISTANT, resources.TOOL]), [6]),
        (Filter(metadata=[Filter.Metadata(key="week", values=["second", "third"])]), [4, 5, 6]),
        (Filter(speakers=["Bob"], metadata=[Filter.Metadata(key="week")]), [2, 4]),
        (Filter(speakers=["bob"]), []),
    ],
)
async def test_only_what_matches_is_found_and_listed(
    shared: Asking, wanted: Filter, expected: list[int]
) -> None:
    memory = await told(shared)
    for weight in (0.0, 0.5, 1.0):
        assert (
            sorted(await ranked(shared, memory, filter=wanted, lexical_weight=weight)) == expected
        )
    top = await ranked(shared, memory, filter=wanted, limit=2)
    assert len(top) == min(2, len(expected)), "the top k is full"
    for view in (resources.BASIC, resources.FULL):
        assert await listed(shared, memory, filter=wanted, page_size=2, view=view) == expected
    answer = await shared.ask(memory, QUESTION, filter=wanted)
    assert set(answer.cited) <= set(expected)
    assert answer.usage is not None and answer.usage.routed_documents == len(expected)
    if not expected:
        assert answer.text == NOTHING_FOUND and answer.cited == []


async def test_the_past_and_deletion_within_a_filter(shared: Asking) -> None:
    memory = await told(shared)
    anna = Filter(speakers=["Anna"])
    assert sorted(await ranked(shared, memory, filter=anna, at_revision=3)) == [1, 3]
    await shared.delete_documents(memory, 3)
    assert sorted(await ranked(shared, memory, filter=anna)) == [1, 5]
    assert sorted(await ranked(shared, memory, filter=anna, at_revision=4)) == [1]
    assert await listed(shared, memory, filter=anna, at_revision=4) == [1]
    answer = await shared.ask(memory, QUESTION, filter=anna, at_revision=4)
    assert answer.cited == [1]
    await shared.append(memory, "Anna does live in town 7")
    assert sorted(await ranked(shared, memory, filter=anna)) == [1, 5], "what is new has no speaker"


async def test_a_document_of_several_turns_matches_by_one_of_them(shared: Asking) -> None:
    memory = await told(
        shared,
        packing=resources.PackingPolicy(mode=resources.PackingPolicy.WINDOW, window_turns=3),
    )
    bob = Filter(speakers=["Bob"])
    assert await listed(shared, memory, filter=bob) == [1, 2]
    second = Filter(speakers=["Bob"], occurred_from=day(4))
    assert await listed(shared, memory, filter=second) == [2]
    assert await ranked(shared, memory, filter=second) == [2]
    early = Filter(roles=[resources.ASSISTANT], occurred_before=day(6))
    assert await listed(shared, memory, filter=early) == [], "no one turn is both"


async def test_a_listing_looks_at_so_many_documents_a_call(
    shared: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = await told(shared)
    monkeypatch.setattr(sources, "_LOOKED_AT", 2)
    monkeypatch.setattr(sources, "_BATCH", 2)
    request = pb.ListDocumentsRequest(parent=memory, filter=Filter(occurred_from=day(5)))
    page = await shared.as_operator(shared.memories.ListDocuments, request)
    assert not page.documents and page.next_page_token
    assert await listed(shared, memory, filter=Filter(occurred_from=day(5))) == [5, 6]


async def test_a_page_token_belongs_to_its_filter(shared: Asking) -> None:
    memory = await told(shared)
    request = pb.ListDocumentsRequest(parent=memory, page_size=1, filter=Filter(speakers=["Anna"]))
    page = await shared.as_operator(shared.memories.ListDocuments, request)
    assert page.next_page_token
    request.filter.speakers[0], request.page_token = "Bob", page.next_page_token
    found = await refused(shared.as_operator(shared.memories.ListDocuments, request))
    assert found.reason == "PAGE_TOKEN_INVALID"


@pytest.mark.parametrize(
    ("wanted", "reason", "field"),
    [
        (Filter(occurred_from=day(2), occurred_before=day(2)), "FIELD_INVALID", "occurred_before"),
        (Filter(occurred_from=Timestamp(seconds=-(10**12))), "FIELD_INVALID", "occurred_from"),
        (Filter(roles=[resources.USER, resources.ROLE_UNSPECIFIED]), "FIELD_REQUIRED", "roles[1]"),
        (Filter(roles=[resources.USER, UNKNOWN]), "FIELD_INVALID", "roles[1]"),
        (Filter(roles=[resources.USER, resources.USER]), "FIELD_INVALID", "roles[1]"),
        (Filter(speakers=["Anna", ""]), "FIELD_REQUIRED", "speakers[1]"),
        (Filter(speakers=["x" * 129]), "TEXT_TOO_LONG", "speakers[0]"),
        (Filter(speakers=["a\0b"]), "TEXT_NOT_CLEAN", "speakers[0]"),
        (Filter(speakers=["x"] * 65), "TOO_MANY_ITEMS", "speakers"),
        (Filter(metadata=[Filter.Metadata(key="k")] * 17), "TOO_MANY_ITEMS", "metadata"),
        (Filter(metadata=[Filter.Metadata(values=["v"])]), "FIELD_REQUIRED", "metadata[0].key"),
        (Filter(metadata=[Filter.Metadata(key="No")]), "FIELD_INVALID", "metadata[0].key"),
        (
            Filter(metadata=[Filter.Metadata(key="k", values=["x" * 1025])]),
            "TEXT_TOO_LONG",
            "metadata[0].values[0]",
        ),
        (
            Filter(metadata=[Filter.Metadata(key="k", values=["x"] * 65)]),
            "TOO_MANY_ITEMS",
            "metadata[0].values",
        ),
    ],
)
async def test_a_filter_that_makes_no_sense_is_refused(
    shared: Asking, wanted: Filter, reason: str, field: str
) -> None:
    memory = "memories/none-such"
    calls = [
        shared.stream(memory, QUESTION, filter=wanted),
        ranked(shared, memory, filter=wanted),
        listed(shared, memory, filter=wanted),
    ]
    for call in calls:
        found = await refused(call)
        assert (found.reason, found.field) == (reason, f"filter.{field}")


async def test_a_worker_that_knows_no_filters_is_not_asked(folder: Folder, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder.copy(data)
    async with (
        worker_apart(data, tmp_path / "w") as worker,
        worker_behind(Unaware, worker.address, tmp_path) as address,
        asking(folder, data, worker_address=address) as running,
    ):
        memory = await told(running)
        anna = Filter(speakers=["Anna"])
        for call in (
            running.stream(memory, QUESTION, filter=anna),
            ranked(running, memory, filter=anna),
        ):
            found = await refused(call)
            assert (found.reason, found.field) == ("FILTER_UNSUPPORTED", "filter")
        assert len(await ranked(running, memory)) == 6, "without a filter it answers"
        assert await listed(running, memory, filter=anna) == [1, 3, 5], "needs no worker"
