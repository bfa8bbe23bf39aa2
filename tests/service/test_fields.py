"""What users write into a memory's row rests sealed, and comes back as it was."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from memsvc.canaries import Search
from memsvc.fields import Fields
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.v1 import resources_pb2 as resources
from memsvc.writes import memory_uid
from storage.store import KeyMissingError, TenantRemovedError, WrongKeyError
from tests.service.test_deletion import row_of
from tests.support.served import Serve, Served, refused

NAME, LABEL = "Ängström's secret herons", "label canary 55d1"


def search(served: Served, *canaries: str) -> list[str]:
    """Files of the data folder that hold one of them."""
    found = Search(canaries).folder(served.server.application.data.root)
    return sorted({Path(hit.where).name for hit in found})


async def test_names_and_labels_come_back_and_rest_nowhere(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons", display_name=NAME, labels={"k": LABEL})
        assert (memory.display_name, dict(memory.labels)) == (NAME, {"k": LABEL})
        get = pb.GetMemoryRequest(name=memory.name)
        found = await served.as_operator(served.memories.GetMemory, get)
        assert (found.display_name, dict(found.labels)) == (NAME, {"k": LABEL})
        await served.create("otters")
        page = await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
        assert [one.display_name for one in page.memories] == ["", NAME]
        await served.append(memory.name, "a text of herons")
        assert search(served, NAME, LABEL, "a text of herons") == []
        row = await row_of(served, memory.name)
        assert row.display_name.startswith("\x01")
        assert row.labels == {}


async def test_a_memory_is_shown_at_one_look_and_its_open_keys_need_none(start: Serve) -> None:
    """Each look is a hop to a thread, for which other tenants' work may be in the way."""
    async with start() as served:
        memory = await served.create("herons")
        app = served.server.application
        begun: list[object] = []
        event.listen(app.catalog._database.engine, "begin", begun.append)
        await served.as_operator(served.memories.GetMemory, pb.GetMemoryRequest(name=memory.name))
        assert len(begun) == 1
        await served.as_operator(served.memories.ListMemories, pb.ListMemoriesRequest())
        assert len(begun) == 2
        tenant = (await row_of(served, memory.name)).tenant_uid
        assert app.keys.known(tenant) is app.keys.tenant(tenant)
        app.keys.destroy_tenant(tenant)
        assert app.keys.known(tenant) is None
        with pytest.raises(TenantRemovedError):
            await app.fields.fingerprint(tenant, b"digest")


async def test_a_memory_whose_key_is_gone_is_no_memory_and_hides_no_other(start: Serve) -> None:
    """As between the destruction of its key and the end of its deletion."""
    async with start() as served:
        for name in ("herons", "otters", "storks"):
            await served.create(name, display_name=NAME)
        row = await row_of(served, "memories/otters")
        keys = served.server.application.keys.tenant(row.tenant_uid)
        assert keys is not None
        keys.destroy(memory_uid(row))
        list_all = pb.ListMemoriesRequest()
        page = await served.as_operator(served.memories.ListMemories, list_all)
        assert [one.name for one in page.memories] == ["memories/storks", "memories/herons"]
        got = served.memories.GetMemory, pb.GetMemoryRequest(name="memories/otters")
        assert (await refused(served.as_operator(*got))).reason == "MEMORY_NOT_FOUND"


async def test_one_of_both_is_changed(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons", display_name=NAME, labels={"k": LABEL})

        async def update(path: str, etag: str = "", **fields: Any) -> resources.Memory:
            wanted = resources.Memory(name=memory.name, etag=etag, **fields)
            request = pb.UpdateMemoryRequest(memory=wanted)
            request.update_mask.paths.append(path)
            reply: resources.Memory = await served.as_operator(
                served.memories.UpdateMemory, request
            )
            return reply

        changed = await update("display_name", display_name="other canary name")
        assert (changed.display_name, dict(changed.labels)) == ("other canary name", {"k": LABEL})
        changed = await update("labels", labels={"a": "b"})
        assert (changed.display_name, dict(changed.labels)) == ("other canary name", {"a": "b"})
        await asyncio.gather(*(update("labels", labels={"n": str(n)}) for n in range(5)))
        stale = update("display_name", etag=memory.etag, display_name="x")
        assert (await refused(stale)).reason == "ETAG_MISMATCH"
        cleared = await update("display_name")
        assert cleared.display_name == ""
        assert search(served, NAME, LABEL, "other canary name") == []


async def test_a_repeated_creation_answers_the_same_until_the_memory_goes(start: Serve) -> None:
    async with start() as served:
        request = pb.CreateMemoryRequest(
            memory=resources.Memory(display_name=NAME, labels={"k": LABEL}), request_id="once"
        )
        first = await served.as_operator(served.memories.CreateMemory, request)
        assert await served.as_operator(served.memories.CreateMemory, request) == first
        assert first.display_name == NAME
        keys = served.server.application.keys.tenant((await row_of(served, first.name)).tenant_uid)
        assert keys is not None
        assert len(keys.memories()) == 1, "the repeated call's key is gone"
        gone = pb.DeleteMemoryRequest(name=first.name)
        await served.as_operator(served.memories.DeleteMemory, gone)
        again = await refused(served.as_operator(served.memories.CreateMemory, request))
        assert again.reason == "MEMORY_NOT_FOUND"
        request.memory.display_name = "another"
        other = await refused(served.as_operator(served.memories.CreateMemory, request))
        assert other.reason == "REQUEST_ID_REUSED"
        assert search(served, NAME, LABEL) == []


async def test_a_name_that_is_taken_leaves_no_key(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons", display_name=NAME)
        request = pb.CreateMemoryRequest(
            memory_id="herons", memory=resources.Memory(display_name="x")
        )
        taken = await refused(served.as_operator(served.memories.CreateMemory, request))
        assert taken.reason == "ALREADY_EXISTS"
        row = await row_of(served, memory.name)
        keys = served.server.application.keys.tenant(row.tenant_uid)
        assert keys is not None
        assert len(keys.memories()) == 1


async def test_fields_are_bound_to_their_memory(start: Serve) -> None:
    async with start() as served:
        for name in ("herons", "otters"):
            await served.create(name, display_name=f"all about {name}")
        application = served.server.application
        herons, otters = [await row_of(served, f"memories/{n}") for n in ("herons", "otters")]
        fields = Fields(application.keys)
        assert (await fields.opened(herons)).display_name == "all about herons"
        from dataclasses import replace

        broken = herons.display_name[:-6] + "AAAA=="
        for text in (otters.display_name, "plain", "\x01", "\x01????", broken):
            with pytest.raises(WrongKeyError):
                await fields.opened(replace(herons, display_name=text))
        await fields.forget(herons)
        with pytest.raises(KeyMissingError):
            await fields.opened(herons)


async def test_fingerprints_are_keyed(start: Serve) -> None:
    """The same text under the same request id in two tenants gives two fingerprints."""
    async with start() as served:
        fields = served.server.application.fields
        tenant = (await served.server.application.catalog.get_tenant("default")).uid
        found = [await fields.fingerprint(uid, b"h" * 32) for uid in (tenant, tenant, "0b" * 16)]
        assert found[0] == found[1] != found[2]
        assert b"h" * 32 not in found
        await served.create("herons")
        await served.append("memories/herons", "short", request_id="r")
        path = served.server.application.data.catalog
    with sqlite3.connect(path) as database:
        (kept,) = database.execute("SELECT fingerprint FROM requests").fetchone()
    assert len(kept) == 32
