"""Documents past their memory's retention are deleted, and no others."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from google.protobuf.duration_pb2 import Duration

from memsvc.application import Application
from memsvc.retention import expire
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from storage.catalog import MemoryRow
from tests.service.test_deletion import row_of
from tests.support.answers import eventually
from tests.support.served import Serve, Served, refused

DAY_S = 86_400


def in_days(days: float) -> int:
    """UTC microseconds."""
    return round((time.time() + days * DAY_S) * 1e6)


async def update(served: Served, name: str, *paths: str, **fields: Any) -> resources.Memory:
    wanted = resources.Memory(name=name, **fields)
    request = pb.UpdateMemoryRequest(memory=wanted)
    request.update_mask.paths.extend(paths)
    reply: resources.Memory = await served.as_operator(served.memories.UpdateMemory, request)
    return reply


async def test_documents_go_when_their_time_is_over(start: Serve) -> None:
    async with start() as served:
        application = served.server.application
        kept = await served.create("kept")
        memory = await served.create("herons", retention=Duration(seconds=7 * DAY_S))
        assert memory.retention.seconds == 7 * DAY_S
        assert not kept.HasField("retention")
        for name in (kept.name, memory.name):
            await served.append(name, "one", "two", "three")
        assert await expire(application, in_days(6.9)) == 0
        assert await served.texts(memory.name) == ["one", "two", "three"]
        assert await expire(application, in_days(7.1)) == 3
        assert await expire(application, in_days(7.1)) == 0
        assert await served.texts(memory.name) == []
        assert await served.texts(kept.name) == ["one", "two", "three"]
        row = await row_of(served, memory.name)
        assert (row.document_count, row.revision, row.retention_s) == (0, 2, 7 * DAY_S)
        receipts = list((application.data.receipts / row.tenant_uid).iterdir())
        assert len(receipts) == 1
        await served.append(memory.name, "four")
        assert await served.texts(memory.name) == ["four"]


async def test_retention_is_changed_and_ended(start: Serve) -> None:
    async with start() as served:
        application = served.server.application
        memory = await served.create("herons", display_name="herons")
        await served.append(memory.name, "one")
        changed = await update(served, memory.name, retention=Duration(seconds=DAY_S))
        assert (changed.retention.seconds, changed.display_name) == (DAY_S, "herons")
        ended = await update(served, memory.name, "retention")
        assert not ended.HasField("retention")
        assert await expire(application, in_days(1000)) == 0
        assert await served.texts(memory.name) == ["one"]


async def test_what_is_no_retention_is_refused(start: Serve) -> None:
    async with start() as served:
        for wrong in (
            Duration(seconds=59),
            Duration(seconds=-1),
            Duration(seconds=60, nanos=1),
            Duration(seconds=2**40),
        ):
            request = pb.CreateMemoryRequest(memory=resources.Memory(retention=wrong))
            call = served.as_operator(served.memories.CreateMemory, request)
            found = await refused(call)
            assert (found.reason, found.field) == ("FIELD_INVALID", "memory.retention")


async def test_a_retention_that_was_prolonged_while_others_expired_holds(start: Serve) -> None:
    """The pass began with the shorter one, and waits for the memory while it is prolonged."""
    async with start() as served:
        application = served.server.application
        memory = await served.create("herons", retention=Duration(seconds=DAY_S))
        await served.append(memory.name, "one", "two")
        row = await row_of(served, memory.name)
        async with application.writes.locks.exclusive(row.tenant_uid, row.memory_id):
            prolonging = asyncio.ensure_future(
                update(served, memory.name, retention=Duration(seconds=9 * DAY_S))
            )
            await waiting(application, row, 1)
            expiring = asyncio.ensure_future(expire(application, in_days(2)))
            await waiting(application, row, 2)
            assert not prolonging.done(), "its turn has not come"
        assert (await prolonging).retention.seconds == 9 * DAY_S
        assert await expiring == 0
        assert await served.texts(memory.name) == ["one", "two"]
        ended = await update(served, memory.name, "retention")
        assert not ended.HasField("retention")


async def waiting(application: Application, row: MemoryRow, count: int) -> None:
    """Returns when so many wait for a memory's lock beside the one that has it."""

    async def look() -> bool:
        return application.writes.locks._users[row.tenant_uid, row.memory_id] > count

    await eventually(look)
