"""What DetachModel purges: blocks that no other model id shows, at the second try too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import memory_uid
from storage.store import EncodingId
from tests.support.answers import Asking
from tests.support.bad_disk import full_disk
from tests.support.blocks import make_block
from tests.support.served import refused

OTHER = "models/other"


def detach(served: Asking, memory: str) -> Any:
    request = pb.DetachModelRequest(memory=memory, model=OTHER)
    return served.as_operator(served.memories.DetachModel, request)


async def attached(served: Asking, identity: str = "") -> str:
    """An encoded memory that is attached to OTHER as well, which is the fake's twin, or has an
    identity of its own.
    """
    memory = await served.create()
    await served.append(memory.name, "one", "two", "three")
    await served.ready(memory.name)
    fake = await served.app.catalog.get_model("fake")
    other = replace(fake, model_id="other", identity=identity or fake.identity, default=False)
    await served.app.catalog.upsert_model(other)
    request = pb.AttachModelRequest(memory=memory.name, model=OTHER)
    await served.as_operator(served.memories.AttachModel, request)
    return str(memory.name)


async def test_blocks_that_another_model_id_shows_are_spared(served: Asking) -> None:
    memory = await attached(served)
    left = await detach(served, memory)
    assert [encoding.model for encoding in left.encodings] == ["models/fake"]
    assert await served.blocks(await served.row(memory)) == [1, 2, 3]
    assert (await served.ask(memory, "two")).cited == [2]


async def test_a_detaching_that_failed_is_finished_by_the_same_call(served: Asking) -> None:
    identity = "ab" * 32
    memory = await attached(served, identity)
    row, encoding = await served.row(memory), EncodingId(bytes.fromhex(identity)[:16])
    layout = (await served.app.catalog.get_model("other")).layout
    blocks = [make_block(layout, number, 5) for number in (1, 2, 3)]
    await served.app.stores.run(
        row.tenant_uid,
        lambda store: store.put_blocks(memory_uid(row), encoding, layout, blocks),
    )
    with full_disk():
        found = await refused(detach(served, memory))
        assert (found.code, found.reason) == ("UNAVAILABLE", "DELETION_UNFINISHED")
    await detach(served, memory)
    stored = await served.app.stores.read(
        row.tenant_uid, lambda store: store.encodings(memory_uid(row))
    )
    assert encoding not in stored and len(stored) == 1
    assert (await served.ask(memory, "two")).cited == [2]
