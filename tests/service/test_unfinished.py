"""Memories whose deletion cannot finish: their keys go all the same, and nobody waits for them."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from memsvc.clock import SteadyClock
from memsvc.housekeeping import keep_house_once
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.v1 import memory_service_pb2 as pb
from memsvc.writes import memory_uid
from storage.catalog import MemoryState, NotFoundError
from storage.failpoints import Failpoint, armed
from tests.service.test_deletion import row_of
from tests.support.answers import eventually
from tests.support.bad_disk import Held, damage, full_disk
from tests.support.served import Caller, Folder, Serve, Served, refused, serve


def drop(served: Served, name: str, *, allow_missing: bool = False) -> Any:
    request = pb.DeleteMemoryRequest(name=name, allow_missing=allow_missing)
    return served.as_operator(served.memories.DeleteMemory, request)


async def deleting(served: Served) -> list[str]:
    """Names of the memories whose deletion has not ended."""
    catalog = served.server.application.catalog
    return [row.memory_id for row in await catalog.memories_in_state(MemoryState.DELETING)]


async def test_a_damaged_store_does_not_keep_the_key(folder: Folder, tmp_path: Path) -> None:
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        memory = await served.create("herons")
        await served.append(memory.name, "one", "two")
        row = await row_of(served, memory.name)
    damage(config.folder.tenant(row.tenant_uid))
    async with serve(config, folder.credential) as served:
        keys = served.server.application.keys.tenant(row.tenant_uid)
        assert keys is not None and memory_uid(row) in keys.memories()
        for allow_missing in (False, True):
            found = await refused(drop(served, memory.name, allow_missing=allow_missing))
            assert (found.code, found.reason) == ("UNAVAILABLE", "DELETION_UNFINISHED")
            assert memory_uid(row) not in keys.memories()
        assert (await refused(drop(served, memory.name))).reason == "MEMORY_NOT_FOUND"
        assert bytes(memory_uid(row)) not in config.folder.keys(row.tenant_uid).read_bytes()
        assert await deleting(served) == ["herons"]


async def test_a_tenant_whose_store_is_damaged_keeps_no_other_waiting(
    folder: Folder, tmp_path: Path
) -> None:
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        theirs, uid = await acme(served)
        await theirs.create("damaged")
        await theirs.append("memories/damaged", "one")
    damage(config.folder.tenant(uid))
    async with serve(config, folder.credential) as served:
        theirs = Served(served.server, served.channel, theirs.as_operator)
        assert (await refused(drop(theirs, "memories/damaged"))).reason == "DELETION_UNFINISHED"
        await served.create("herons")
        await served.append("memories/herons", "one")
        with full_disk():
            assert (await refused(drop(served, "memories/herons"))).reason == "DELETION_UNFINISHED"
        assert await deleting(served) == ["damaged", "herons"]
        await keep_house_once(served.server.application, SteadyClock())
        assert await deleting(served) == ["damaged"]


async def test_a_repeated_deletion_waits_for_the_first(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, "one")
        async with Held().during(drop(served, memory.name)) as first:
            again = asyncio.ensure_future(ended(drop(served, memory.name, allow_missing=True)))
            # So many calls end that begin after it.
            for _ in range(20):
                await refused(served.as_operator(served.memories.GetMemory, get(memory.name)))
            assert not first.done()
            assert not again.done()
        await again
        assert await deleting(served) == []


async def test_a_repeated_deletion_finishes_what_the_first_left(start: Serve) -> None:
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, "one")
        row = await row_of(served, memory.name)
        with full_disk():
            assert (await refused(drop(served, memory.name))).reason == "DELETION_UNFINISHED"
        await served.create("herons")
        newer = await row_of(served, memory.name)
        await drop(served, memory.name)
        assert await deleting(served) == ["herons"], "the newer one is gone, the first is left"
        await drop(served, memory.name, allow_missing=True)
        assert await deleting(served) == []
        held = await served.server.application.stores.read(
            row.tenant_uid, lambda store: store.memories()
        )
        assert {memory_uid(row), memory_uid(newer)}.isdisjoint(held)


async def test_whatever_fails_is_not_the_end_of_housekeeping(
    start: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memsvc.housekeeping._EVERY_S", 0.02)
    async with start() as served:
        memory = await served.create("herons")
        await served.append(memory.name, "one")
        failed = 0

        def fail(_: Failpoint) -> None:
            nonlocal failed
            failed += 1
            raise ValueError("nobody thought of it")

        async def often() -> bool:
            return failed > 3

        with armed(fail):
            await refused(drop(served, memory.name))
            await eventually(often)
        with full_disk():
            await refused(drop(served, memory.name))

        async def finished() -> bool:
            return not await deleting(served)

        await eventually(finished)


async def ended(call: Any) -> None:
    await call


def get(name: str) -> pb.GetMemoryRequest:
    return pb.GetMemoryRequest(name=name)


async def test_a_tenants_files_that_cannot_be_removed_are_told_of(
    folder: Folder, tmp_path: Path
) -> None:
    """Its store was moved to another volume, and a link put in its place."""
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        theirs, uid = await acme(served)
        await theirs.create("herons")
        await theirs.append("memories/herons", "one")
        store, moved = config.folder.tenant(uid), tmp_path / "elsewhere"
        shutil.move(store, moved)
        store.symlink_to(moved)
        gone = admin.DeleteTenantRequest(name="tenants/acme")
        for _ in range(2):
            found = await refused(served.as_operator(served.admin.DeleteTenant, gone))
            assert (found.code, found.reason) == ("UNAVAILABLE", "DELETION_UNFINISHED")
            assert not config.folder.keys(uid).exists(), "its keys go first"
        store.unlink()
        shutil.move(moved, store)
        await served.as_operator(served.admin.DeleteTenant, gone)
        assert not store.exists()


async def acme(served: Served) -> tuple[Served, str]:
    """Another tenant, as one who may write in it sees the server, and its uid."""
    request = admin.CreateTenantRequest(tenant_id="acme")
    await served.as_operator(served.admin.CreateTenant, request)
    key = await served.as_operator(
        served.admin.CreateApiKey,
        admin.CreateApiKeyRequest(
            parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ_WRITE)
        ),
    )
    tenant = await served.server.application.catalog.get_tenant("acme")
    return Served(served.server, served.channel, Caller(key.secret)), tenant.uid


@pytest.mark.parametrize("crashed", [False, True])
async def test_a_tenant_goes_whatever_its_store_is_like(
    folder: Folder, tmp_path: Path, crashed: bool
) -> None:
    config = folder.copy(tmp_path / "data")
    async with serve(config, folder.credential) as served:
        theirs, uid = await acme(served)
        for memory_id in ("herons", "otters"):
            await theirs.create(memory_id)
            await theirs.append(f"memories/{memory_id}", "one")
        if crashed:
            await served.server.application.catalog.begin_delete_tenant(uid)
    damage(config.folder.tenant(uid))
    async with serve(config, folder.credential) as served:
        catalog = served.server.application.catalog
        if not crashed:
            gone = admin.DeleteTenantRequest(name="tenants/acme")
            await served.as_operator(served.admin.DeleteTenant, gone)
        with pytest.raises(NotFoundError):
            await catalog.get_tenant("acme")
        assert await deleting(served) == []
        assert not config.folder.tenant(uid).exists()
        assert not config.folder.keys(uid).exists()
