"""What a call leaves, and says, when a memory or tenant goes away between two of its steps."""

from __future__ import annotations

import asyncio
from typing import Any

from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.writes import memory_uid
from tests.service.test_deletion import row_of
from tests.service.test_successors import delete, get
from tests.support.answers import eventually
from tests.support.held import Held
from tests.support.served import Served


def rename(served: Served, name: str, display_name: str) -> Any:
    memory = resources.Memory(name=name, display_name=display_name)
    request = pb.UpdateMemoryRequest(memory=memory)
    return served.as_operator(served.memories.UpdateMemory, request)


async def test_a_rename_beside_a_deletion_leaves_no_key(served: Served) -> None:
    application = served.server.application
    memory = await served.create("herons", display_name="Herons")
    row = await row_of(served, memory.name)
    sealing = Held(application.fields, "sealed")
    renaming = asyncio.ensure_future(rename(served, memory.name, "Grey herons"))
    await sealing.reached.wait()
    deletion = asyncio.ensure_future(delete(served, memory.name))

    async def ended_or_waits() -> bool:
        users = application.writes.locks._users
        return deletion.done() or users.get((row.tenant_uid, row.memory_id)) == 2

    await eventually(ended_or_waits)
    sealing.go_on.set()
    await asyncio.gather(renaming, deletion, return_exceptions=True)
    keys = application.keys.tenant(row.tenant_uid)
    assert keys is not None
    assert memory_uid(row) not in keys.memories()


async def test_a_fork_has_the_name_that_its_parent_has_now(served: Served) -> None:
    memory = await served.create("herons", display_name="Herons")
    await served.append(memory.name, "one")
    await rename(served, memory.name, "Grey herons")
    await served.fork(memory.name, "forked")
    assert (await get(served, "memories/forked")).display_name == "Grey herons"
