"""Numbers and times of an archive that a memory could not go on from, or nobody could read."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from memsvc.v1 import memory_service_pb2 as pb
from storage.archive import Manifest
from tests.service.test_successors import import_as
from tests.support.archives import EMPTY, HISTORY, pack, signed
from tests.support.blocks import make_document
from tests.support.served import Served, refused

DAY_US = 86_400 * 1_000_000
MOST = 2**53 - 1
#: With labels that a memory can have.
PLAIN = replace(EMPTY, labels={})
LAST_US = 253_402_300_799_999_999


def of_one(created_at_us: int, manifest: Manifest = PLAIN) -> bytes:
    return pack([replace(make_document(1), created_at_us=created_at_us)], manifest=manifest)


@pytest.mark.parametrize("field", ["last_number", "revision"])
async def test_a_memory_goes_on_from_the_highest_that_is_taken(served: Served, field: str) -> None:
    """At 2**63 - 1 a write behind it would have no number."""
    for value in (2**63 - 1, MOST + 1):
        manifest = replace(PLAIN, **{field: value})  # type: ignore[arg-type]  # an int, both
        data = pack([make_document(1)], manifest=manifest)
        assert (await refused(import_as(served, data, "taken"))).reason == "ARCHIVE_CORRUPT"
    manifest = replace(PLAIN, **{field: MOST})  # type: ignore[arg-type]  # an int, both
    reply = await import_as(served, pack([make_document(1)], manifest=manifest), "taken")
    written = await served.append(reply.memory.name, "one more")
    expected = {"last_number": 60, "revision": 50} | {field: MOST}
    assert written.revision == expected["revision"] + 1
    number = expected["last_number"] + 1
    assert list(written.documents) == [f"memories/taken/documents/{number}"]


async def test_times_are_of_the_calendar_and_not_ahead(served: Served) -> None:
    """Else no Timestamp holds them, and no retention reaches them."""
    now = time.time_ns() // 1000
    for created_at_us, reason in (
        (2**63 - 1, "ARCHIVE_CORRUPT"),
        (LAST_US + 1, "ARCHIVE_CORRUPT"),
        (-(2**63) + 1, "ARCHIVE_CORRUPT"),
        (LAST_US, "ARCHIVE_FORBIDDEN"),
        (now + 2 * DAY_US, "ARCHIVE_FORBIDDEN"),
    ):
        call = import_as(served, of_one(created_at_us), "taken")
        assert (await refused(call)).reason == reason, created_at_us
        history = [*HISTORY[:3], replace(HISTORY[3], created_at_us=created_at_us)]
        call = import_as(served, signed(history=history, manifest=PLAIN), "taken")
        assert (await refused(call)).reason == reason, created_at_us
    manifest = replace(PLAIN, created_at_us=LAST_US + 1)
    answer = await refused(import_as(served, of_one(now, manifest), "taken"))
    assert answer.reason == "ARCHIVE_CORRUPT"
    catalog = served.server.application.catalog
    tenant = await catalog.get_tenant("default")
    assert (await catalog.usage(tenant.uid)).memories == 0
    # A clock that is ahead by minutes is no reason.
    reply = await import_as(served, of_one(now + DAY_US // 24), "taken")
    assert await served.texts(reply.memory.name) == ["tea, please"]


@pytest.mark.parametrize("field", ["documents_added", "documents_removed"])
async def test_revisions_count_no_more_documents_than_there_were_numbers(
    served: Served, field: str
) -> None:
    """Else their sum has no number."""
    for value in (2**62, HISTORY[1].last_number + 1):
        changed = replace(HISTORY[1], **{field: value})
        data = signed(history=[HISTORY[0], changed, *HISTORY[2:]], manifest=PLAIN)
        assert (await refused(import_as(served, data, "taken"))).reason == "ARCHIVE_CORRUPT"
    reply = await import_as(served, signed(manifest=PLAIN), "taken")
    request = pb.ForkMemoryRequest(name=reply.memory.name, memory_id="forked", at_revision=4)
    forked = await served.as_operator(served.memories.ForkMemory, request)
    assert forked.documents_missing == 0
