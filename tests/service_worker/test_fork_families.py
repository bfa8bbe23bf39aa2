"""Families of forks: kept whole by a backup, and gone whole with their tenant."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from memsvc.backup import back_up, restore
from memsvc.v1 import admin_service_pb2 as admin
from memsvc.writes import memory_uid
from storage.catalog import Catalog
from storage.catalog.tables import metadata
from storage.keys import parse_key
from tests.service_worker.conftest import Serve
from tests.support.answers import Asking, asking
from tests.support.served import Caller, Folder

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUESTION = "Where does Anna live?"
PLACES = ("Graz", "Lisbon", "Oslo", "Porto")


async def family(served: Asking, surname: str = "") -> dict[str, str]:
    """A memory, a fork of its past, one of now that went on, and a fork of that one.

    Texts are in all of them; names by what they are.
    """
    parent = (await served.create(f"parent{surname}")).name
    for place in PLACES[:3]:
        await served.append(parent, f"Anna does live in {place}")
    await served.ready(parent)
    past = (await served.fork(parent, f"past{surname}", at_revision=1)).memory.name
    child = (await served.fork(parent, f"child{surname}")).memory.name
    await served.append(child, f"Anna does live in {PLACES[3]}")
    await served.delete_documents(child, 2)
    grandchild = (await served.fork(child, f"grandchild{surname}")).memory.name
    for name in (past, child, grandchild):
        await served.ready(name)
    return {"parent": parent, "past": past, "child": child, "grandchild": grandchild}


async def said(served: Asking, name: str) -> tuple[list[str], str, list[int], int]:
    """What a memory shows and answers."""
    answer = await served.ask(name, QUESTION)
    assert answer.usage is not None
    return await served.texts(name), answer.text, answer.cited, answer.usage.routed_documents


async def test_forks_of_a_backup_outlive_their_parent(
    folder: Folder, start: Serve, tmp_path: Path
) -> None:
    async with start() as served:
        names = await family(served)
        forks = [names[kind] for kind in ("past", "child", "grandchild")]
        before = {name: await said(served, name) for name in forks}
        config = served.app.config
    assert [len(texts) for texts, *_ in before.values()] == [1, 3, 3]
    await asyncio.to_thread(back_up, config, tmp_path / "backup")
    root_key = str(config.root_key_path)
    again = replace(config, data=tmp_path / "restored", root_key_file=root_key)
    outcome = await asyncio.to_thread(restore, again, tmp_path / "backup")
    assert outcome.damage == ()
    async with asking(folder, again.data, root_key_file=root_key) as served:
        assert {name: await said(served, name) for name in forks} == before
        await served.delete(names["parent"])
        assert {name: await said(served, name) for name in forks} == before
        await served.delete(names["child"])
        for name in (names["past"], names["grandchild"]):
            assert await said(served, name) == before[name]
            assert await served.problems(await served.row(name)) == []


async def test_a_tenant_goes_with_all_generations_of_its_forks(shared: Asking) -> None:
    """Nothing of it is left in files, keys or rows; the other tenant's family is whole."""
    kept = await family(shared, "-kept")
    make = admin.CreateTenantRequest(tenant_id="acme")
    await shared.as_operator(shared.admin.CreateTenant, make)
    request = admin.CreateApiKeyRequest(
        parent="tenants/acme", api_key=admin.ApiKey(scope=admin.READ_WRITE)
    )
    key = await shared.as_operator(shared.admin.CreateApiKey, request)
    theirs = Asking(shared.server, shared.channel, Caller(key.secret))
    names = await family(theirs)
    # A generation that is gone already leaves records that others show.
    await theirs.delete(names["child"])
    tenant = await shared.app.catalog.get_tenant("acme")
    listed, _ = await shared.app.catalog.list_memories(tenant.uid, 10)
    uids = {tenant.uid, *(row.uid for row in listed)}
    assert len(uids) == 4
    assert await rows_with(shared.app.catalog, uids) >= {"memories", "documents", "encodings"}
    gone = admin.DeleteTenantRequest(name="tenants/acme")
    await shared.as_operator(shared.admin.DeleteTenant, gone)
    # The trail outlives its tenant; see docs/operations/audit.md.
    assert await rows_with(shared.app.catalog, uids) <= {"audit"}
    assert not shared.app.data.keys(tenant.uid).exists()
    assert not shared.app.data.tenant(tenant.uid).exists()
    left = [path for path in shared.app.data.root.rglob("*") if tenant.uid in str(path)]
    assert {path.relative_to(shared.app.data.root).parts[0] for path in left} == {"receipts"}
    for name in kept.values():
        assert await shared.problems(await shared.row(name)) == []


async def test_memories_of_a_family_leave_nothing_when_all_are_deleted(shared: Asking) -> None:
    """In whatever order, here the oldest first."""
    names = await family(shared)
    rows = [await shared.row(name) for name in names.values()]
    for name in names.values():
        await shared.delete(name)
    uids = {memory_uid(row) for row in rows}
    records: list[Any] = await shared.app.stores.read(
        rows[0].tenant_uid,
        lambda store: [parse_key(key) for key, _ in store.iter_raw()],  # type: ignore[attr-defined]  # LMDB's
    )
    assert [record for record in records if record.memory in uids] == []
    keys = shared.app.keys.tenant(rows[0].tenant_uid)
    assert keys is not None
    assert not uids & set(keys.memories())
    assert await rows_with(shared.app.catalog, {row.uid for row in rows}) == set()


async def rows_with(catalog: Catalog, values: set[str]) -> set[str]:
    """Tables of which a row holds one of the values."""
    found: set[str] = set()
    async with catalog._database.reading() as connection:
        for table in metadata.sorted_tables:
            rows = (await connection.execute(select(table))).all()
            if any(value in values for row in rows for value in row):
                found.add(table.name)
    return found
