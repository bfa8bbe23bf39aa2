"""Transfers that are cut go on where they were, or say that they cannot."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from tests.service_worker.conftest import Serve
from tests.service_worker.test_archive import LETTERS, _export, _exported, _import
from tests.support.answers import Asking, eventually
from tests.support.served import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def large(served: Asking) -> resources.Memory:
    """A memory whose archive does not fit the buffers on its way."""
    memory = await served.create()
    chance = random.Random(5)
    texts = ["".join(chance.choices(LETTERS, k=120_000)) for _ in range(10)]
    for _ in range(6):
        await served.append(memory.name, *texts)
    return memory


async def cut(served: Asking, memory: str, pieces: int, **fields: Any) -> tuple[bytes, int]:
    """The beginning of an export, which is then left; and the archive's size."""
    call = _export(served, memory, without_blocks=True, **fields)
    messages = [await call.read() for _ in range(pieces)]
    call.cancel()
    await eventually(lambda: _nothing_runs(served))
    return b"".join(message.data for message in messages), messages[0].total_bytes


async def _nothing_runs(served: Asking) -> bool:
    return not served.app.progress.subscribers and not served.app.staging.active


async def kept(served: Asking) -> int:
    return len(list(served.app.data.staging.iterdir()))


async def test_an_export_goes_on_byte_for_byte(shared: Asking) -> None:
    memory = await large(shared)
    begun, total = await cut(shared, memory.name, 2, request_id="mine")
    assert 0 < len(begun) < total and await kept(shared) == 1
    # What is appended meanwhile belongs to another archive.
    await shared.append(memory.name, "later")
    more, again = await cut(shared, memory.name, 1, request_id="mine", offset=len(begun))
    assert again == total
    begun += more
    rest = await _exported_from(shared, memory.name, len(begun), request_id="mine")
    assert len(begun + rest) == total and await kept(shared) == 0
    reply = await _import(shared, begun + rest)
    assert reply.memory.document_count == 60
    assert await shared.texts(reply.memory.name) == (await shared.texts(memory.name))[:60]


async def _exported_from(served: Asking, memory: str, offset: int, **fields: Any) -> bytes:
    call = _export(served, memory, without_blocks=True, offset=offset, **fields)
    return b"".join([reply.data async for reply in call])


async def test_an_export_that_is_not_kept_says_so(shared: Asking) -> None:
    memory = await large(shared)
    begun, total = await cut(shared, memory.name, 1, request_id="one")
    other = await shared.create()
    for name, request_id in ((memory.name, "two"), (other.name, "one")):
        call = _export(shared, name, offset=len(begun), request_id=request_id, without_blocks=True)
        found = await refused(call)
        assert (found.reason, found.field) == ("OFFSET_NOT_AVAILABLE", "offset")
        assert found.metadata["available"] == "0"
    # None of that took it from its own call.
    fields: dict[str, Any] = {"request_id": "one", "without_blocks": True}
    found = await refused(_export(shared, memory.name, offset=total + 1, **fields))
    assert found.metadata["available"] == str(total)
    at_end = [reply async for reply in _export(shared, memory.name, offset=total, **fields)]
    assert [reply.data for reply in at_end] == [b""] and at_end[0].total_bytes == total
    for offset, request_id in ((-1, "one"), (5, "")):
        call = _export(shared, memory.name, offset=offset, request_id=request_id)
        found = await refused(call)
        assert (found.reason, found.field) == ("FIELD_INVALID", "offset")
    assert await kept(shared) == 0


@pytest.mark.parametrize("what", ["document", "memory"])
async def test_a_deletion_ends_what_is_kept(shared: Asking, what: str) -> None:
    memory = await large(shared)
    begun, _ = await cut(shared, memory.name, 1, request_id="mine")
    assert await kept(shared) == 1
    if what == "document":
        await shared.delete_documents(memory.name, 3)
    else:
        await shared.delete(memory.name)
    found = await refused(
        _export(shared, memory.name, without_blocks=True, request_id="mine", offset=len(begun))
    )
    expected = {"document": "OFFSET_NOT_AVAILABLE", "memory": "MEMORY_NOT_FOUND"}
    assert found.reason == expected[what]
    await eventually(lambda: _none_kept(shared))


async def _none_kept(served: Asking) -> bool:
    return not await kept(served)


async def send(served: Asking, data: bytes, end: bool, **header: Any) -> Any:
    """A call that sends data; without an end it is cut when all of it was received."""

    async def messages() -> AsyncIterator[pb.ImportMemoryRequest]:
        yield pb.ImportMemoryRequest(header=pb.ImportMemoryRequest.Header(**header))
        for start in range(0, len(data), 2**16):
            yield pb.ImportMemoryRequest(data=data[start : start + 2**16])
        if not end:
            await asyncio.Event().wait()

    call = served.as_operator(served.memories.ImportMemory, messages())
    if end:
        return await call
    expected = header.get("offset", 0) + len(data)

    async def received() -> bool:
        return any(staged.size == expected for staged in served.app.staging.active)

    await eventually(received)
    call.cancel()
    await eventually(lambda: _nothing_runs(served))
    return None


async def test_an_import_goes_on_where_it_was_cut(shared: Asking) -> None:
    memory = await large(shared)
    data = await _exported(shared, memory.name, without_blocks=True)
    third = len(data) // 3
    await send(shared, data[:third], False, request_id="up")
    # Asked with its whole size, the server says what is there; and keeps it.
    found = await refused(_import(shared, b"", request_id="up", offset=len(data)))
    assert (found.reason, found.field) == ("OFFSET_NOT_AVAILABLE", "header.offset")
    assert found.metadata["available"] == str(third)
    await send(shared, data[third : 2 * third], False, request_id="up", offset=third)
    reply = await send(
        shared, data[2 * third :], True, request_id="up", offset=2 * third, memory_id="resumed"
    )
    assert await shared.texts(reply.memory.name) == await shared.texts(memory.name)
    # Repeated from the start it is the same request.
    again = await _import(shared, data, request_id="up", memory_id="resumed")
    assert again.memory.uid == reply.memory.uid
    assert await kept(shared) == 0


async def test_an_import_that_is_not_kept_begins_again(shared: Asking) -> None:
    memory = await shared.create()
    await shared.append(memory.name, "kept")
    data = await _exported(shared, memory.name)
    found = await refused(_import(shared, data[7:], offset=7, request_id="none"))
    assert found.metadata["available"] == "0"
    for offset, request_id in ((5, ""), (-1, "none")):
        found = await refused(_import(shared, data, offset=offset, request_id=request_id))
        assert (found.reason, found.field) == ("FIELD_INVALID", "header.offset")
    await send(shared, data[:100], False, request_id="twice")
    reply = await _import(shared, data, request_id="twice")
    assert await shared.texts(reply.memory.name) == ["kept"]
    # Half of one archive and half of another are refused as any damage is.
    await send(shared, data[:100], False, request_id="mixed")
    found = await refused(_import(shared, bytes(len(data)), request_id="mixed", offset=100))
    assert found.reason.startswith("ARCHIVE_") and await kept(shared) == 0


async def test_nothing_is_kept_where_that_is_said(start: Serve) -> None:
    async with start(transfer_keep_s=0) as served:
        memory = await large(served)
        begun, _ = await cut(served, memory.name, 1, request_id="mine")
        assert await kept(served) == 0
        found = await refused(_export(served, memory.name, request_id="mine", offset=len(begun)))
        assert found.reason == "OFFSET_NOT_AVAILABLE"
