"""Two servers over one PostgreSQL and one data folder: a tenant is one's at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memsvc.config import Config, load_config
from memsvc.leases import Leases
from memsvc.places import bury, place_name, take_place
from memsvc.server import initialise
from memsvc.setup import DataFolderError, hold
from memsvc.v1 import admin_service_pb2 as admin
from storage.crypto import TenantKeys
from tests.support.keys import ROOT
from tests.support.postgres import PostgresForTests, postgres
from tests.support.served import NO_WORKER, Caller, Served, refused, serve

__all__ = ["postgres"]


@pytest.fixture
def prepared(postgres: PostgresForTests, tmp_path: Path) -> Iterator[tuple[Config, str, str]]:
    """Settings, the operator's credential, and the database's name."""
    name = postgres.make_database()
    config = load_config(
        {
            "data": tmp_path / "data",
            "listen": "127.0.0.1:0",
            "worker_address": NO_WORKER,
            "database_url": postgres.url(name),
            "lease_s": 600.0,
        }
    )
    credential = initialise(config).credential
    assert credential is not None
    yield config, credential, name
    postgres.drop_database(name)


@pytest.fixture
async def two(prepared: tuple[Config, str, str]) -> AsyncIterator[tuple[Served, Served]]:
    """The first leads all there is, as it came first."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(serve(*prepared[:2]))
        second = await stack.enter_async_context(serve(*prepared[:2]))
        yield first, second


async def test_the_other_one_refuses_and_says_when_to_ask_again(
    two: tuple[Served, Served],
) -> None:
    first, second = two
    memory = await first.create("alice")
    await first.append(memory.name, "a")
    answer = await refused(second.append(memory.name, "b"))
    assert (answer.reason, answer.code) == ("SERVED_ELSEWHERE", "UNAVAILABLE")
    assert answer.retry_s
    told = f"{answer.message} {answer.metadata}"
    for served in two:
        assert served.server.address not in told
    assert await first.texts(memory.name) == ["a"]
    assert (await refused(second.texts(memory.name))).reason == "SERVED_ELSEWHERE"


async def test_the_other_one_takes_over_from_one_that_drains(
    prepared: tuple[Config, str, str],
) -> None:
    config, credential, _ = prepared
    async with serve(config, credential) as first:
        memory = await first.create("alice")
        await first.append(memory.name, "a")
        stack = AsyncExitStack()
        second = await stack.enter_async_context(serve(config, credential))
        await refused(second.append(memory.name, "b"))
    async with stack:
        await second.append(memory.name, "b")
        assert await second.texts(memory.name) == ["a", "b"]
        left = {path.name for path in (config.folder.root / "servers").iterdir()}
        assert left == {second.server.application.data.staging.parent.name}


async def test_tenants_made_later_go_to_whoever_is_asked_first(
    two: tuple[Served, Served],
) -> None:
    first, second = two
    callers = {}
    for name in ("blue", "green"):
        tenant = admin.CreateTenantRequest(tenant_id=name, tenant=admin.Tenant(display_name=name))
        await first.as_operator(first.admin.CreateTenant, tenant)
        key = admin.ApiKey(scope=admin.READ_WRITE)
        request = admin.CreateApiKeyRequest(parent=f"tenants/{name}", api_key=key)
        # Making a key changes nothing that a server keeps in mind.
        made = await second.as_operator(second.admin.CreateApiKey, request)
        callers[name] = Caller(made.secret), made.api_key.name
    blue = replace(second, as_operator=callers["blue"][0])
    green = replace(first, as_operator=callers["green"][0])
    for caller in (blue, green):
        await caller.append((await caller.create("alice")).name, "a")
    elsewhere = replace(first, as_operator=callers["blue"][0])
    assert (await refused(elsewhere.texts("memories/alice"))).reason == "SERVED_ELSEWHERE"
    await _revoked_everywhere(first, second, callers["blue"])
    # The other one's tenant is served on.
    assert await green.texts("memories/alice") == ["a"]


async def _revoked_everywhere(first: Served, second: Served, key: tuple[Caller, str]) -> None:
    """The second leads the key's tenant; the key is known to it, and is ended by it alone."""
    caller, name = key
    revoke = admin.RevokeApiKeyRequest(name=name)
    answer = await refused(first.as_operator(first.admin.RevokeApiKey, revoke))
    assert answer.reason == "SERVED_ELSEWHERE"
    await second.as_operator(second.admin.RevokeApiKey, revoke)
    for served in (first, second):
        mine = replace(served, as_operator=caller)
        assert (await refused(mine.texts("memories/alice"))).reason == "CREDENTIAL_INVALID"


async def test_a_server_that_was_taken_from_writes_nothing_more(
    prepared: tuple[Config, str, str],
) -> None:
    config, credential, _ = prepared
    async with serve(config, credential) as served:
        memory = await served.create("alice")
        await served.append(memory.name, "a")
        catalog = served.server.application.catalog
        async with catalog._database.writing() as connection:
            taken = "UPDATE leases SET server_uid = 'another', fence = fence + 1"
            await connection.exec_driver_sql(taken)
        assert (await refused(served.append(memory.name, "b"))).reason == "SERVED_ELSEWHERE"
        # Known to it now, long before its next beat: it reads nothing for the tenant either.
        assert (await refused(served.texts(memory.name))).reason == "SERVED_ELSEWHERE"
        assert (await refused(served.create("carol"))).reason == "SERVED_ELSEWHERE"
        leases: Any = served.server.application.leases
        await leases._renew()
        assert (await refused(served.texts(memory.name))).reason == "SERVED_ELSEWHERE"
    # The next one sees one write, and nothing of the other.
    async with serve(config, credential) as served:
        assert await served.texts(memory.name) == ["a"]
        assert (await served.append(memory.name, "c")).revision == 2


async def test_a_server_that_was_taken_from_knows_it_of_every_tenant(
    prepared: tuple[Config, str, str],
) -> None:
    """Also where what it held of one could not be put away."""
    async with serve(*prepared[:2]) as served:
        tenant = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, tenant)
        catalog = served.server.application.catalog
        leases: Any = served.server.application.leases
        uids = [(await catalog.get_tenant(name)).uid for name in ("default", "acme")]
        for uid in uids:
            await leases.require(uid)
        async with catalog._database.writing() as connection:
            taken = "UPDATE leases SET server_uid = 'another', fence = fence + 1"
            await connection.exec_driver_sql(taken)
        told: list[str] = []

        async def lost(tenant_uid: str) -> None:
            told.append(tenant_uid)
            raise RuntimeError("a worker cannot be told")

        leases._on_lost = lost
        await leases._renew()
        assert sorted(told) == sorted(uids)
        assert not any(leases.leads(uid) for uid in uids)


async def test_a_beat_that_fails_is_not_the_last(
    prepared: tuple[Config, str, str], tmp_path: Path
) -> None:
    async with serve(*prepared[:2]) as served:
        with take_place(tmp_path) as place:
            leases = Leases(served.server.application.catalog, place, 0.003)
            beats: list[int] = []
            second = asyncio.Event()

            async def beat() -> None:
                beats.append(len(beats))
                if len(beats) == 2:
                    second.set()
                raise RuntimeError("anything")

            task = asyncio.create_task(leases._keep(beat))
            waiting = asyncio.create_task(second.wait())
            await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
            for one in (task, waiting):
                one.cancel()
            assert len(beats) >= 2


async def test_a_tenant_whose_keys_do_not_open_keeps_no_other_from_being_led(
    prepared: tuple[Config, str, str],
) -> None:
    config, credential, _ = prepared
    async with serve(config, credential) as served:
        await served.append((await served.create("alice")).name, "a")
        make = admin.CreateTenantRequest(tenant_id="acme")
        await served.as_operator(served.admin.CreateTenant, make)
        key = await served.as_operator(
            served.admin.CreateApiKey,
            admin.CreateApiKeyRequest(
                parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ_WRITE)
            ),
        )
        acme = replace(served, as_operator=Caller(key.secret))
        await acme.append((await acme.create("alice")).name, "b")
        catalog = served.server.application.catalog
        older, newer = [(await catalog.get_tenant(name)).uid for name in ("default", "acme")]
    path = config.folder.keys(older)
    path.unlink()
    TenantKeys(path, older, ROOT, create=True)  # Of another root key.
    async with serve(config, credential) as served:
        assert served.server.application.leases.leads(newer)
        acme = replace(served, as_operator=Caller(key.secret))
        assert await acme.texts("memories/alice") == ["b"]
        assert not served.server.application.leases.leads(older)


async def test_commands_that_need_the_folder_for_themselves_are_refused_beside_servers(
    two: tuple[Served, Served],
) -> None:
    root = two[0].server.application.data
    with pytest.raises(DataFolderError, match="another memsvc process"), hold(root):
        pass


def test_a_place_is_buried_when_its_process_has_ended(tmp_path: Path) -> None:
    with take_place(tmp_path) as place:
        place.data.staging.mkdir()
        staged = place.data.staging / "half.msamem"
        staged.write_bytes(b"text")
        assert not bury(tmp_path, place.uid)
        assert staged.exists()
        assert place.name == place_name(tmp_path)
    assert not staged.exists()
    assert bury(tmp_path, place.uid)


def test_a_folder_seen_by_another_path_is_the_same_place(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert place_name(tmp_path / "data") == place_name(tmp_path / "link")
    assert place_name(tmp_path / "data") != place_name(tmp_path / "other")


async def test_a_tenant_that_cannot_be_made_ready_is_tried_again(
    prepared: tuple[Config, str, str],
) -> None:
    config, credential, _ = prepared
    async with serve(config, credential) as served:
        memory = await served.create("alice")
        await served.append(memory.name, "a")
    [keys] = config.folder.keys("any").parent.iterdir()
    away = keys.rename(keys.with_suffix(".away"))
    async with serve(config, credential) as served:
        assert (await refused(served.append(memory.name, "b"))).reason == "INTERNAL_FAULT"
        away.rename(keys)
        await served.append(memory.name, "b")
        assert await served.texts(memory.name) == ["a", "b"]
