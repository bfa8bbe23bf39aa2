"""Leases in the catalog: who may claim, what a server that was taken from can still write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest

from storage.catalog import (
    Catalog,
    LeaseLostError,
    MemoryState,
    NotFoundError,
    RevisionRow,
    TenantRow,
)
from storage.catalog.documents import insert_documents
from tests.support.catalogs import (
    append,
    make_key,
    make_memory,
    model_row,
    new_documents,
    open_catalog,
)

#: At places of their own the lock says nothing: time decides.
HERE, THERE = "host 1", "other host 1"
LONG_S, OVER_S = 1000.0, -1.0


@pytest.fixture
async def second(catalog_url: str, catalog: Catalog) -> AsyncIterator[Catalog]:
    """Another server's catalog on the same database."""
    async with open_catalog(catalog_url) as opened:
        yield opened


async def lead(catalog: Catalog, uid: str, place: str, lease_s: float = LONG_S) -> None:
    catalog.lead_as(uid, place)
    await catalog.renew_server(lease_s)


class TestClaims:
    async def test_a_tenant_has_one_server(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await lead(catalog, "one", HERE)
        await lead(second, "two", THERE)
        claims = await asyncio.gather(
            *(one.claim_tenant(tenant.uid) for one in (catalog, second) for _ in range(4))
        )
        # One that comes upon another's claim under way is refused, too.
        winners = [any(claims[:4]), any(claims[4:])]
        assert sorted(winners) == [False, True]
        for one, won in zip((catalog, second), winners, strict=True):
            assert await one.claim_tenant(tenant.uid) == (tenant if won else None)
        assert await catalog.unled_tenants(10) == []

    async def test_what_ended_elsewhere_is_taken_over(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await lead(catalog, "one", HERE)
        assert await catalog.claim_tenant(tenant.uid) == tenant
        await lead(second, "two", THERE)
        assert await second.unled_tenants(10) == []
        await catalog.renew_server(OVER_S)
        assert await second.unled_tenants(10) == [tenant]
        assert await second.claim_tenant(tenant.uid) == tenant
        # And is not given back by a heartbeat.
        assert await catalog.renew_server(LONG_S) == {tenant.uid}
        assert await catalog.renew_server(LONG_S) == set()
        assert await catalog.claim_tenant(tenant.uid) is None
        assert await second.renew_server(LONG_S) == set()

    async def test_here_a_server_leads_until_it_is_buried_whatever_the_time(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await lead(catalog, "one", HERE, OVER_S)
        await catalog.claim_tenant(tenant.uid)
        await lead(second, "two", HERE)
        assert await second.claim_tenant(tenant.uid) is None
        assert await second.servers_here() == ["one"]
        await second.bury_servers(["one"])
        assert await second.claim_tenant(tenant.uid) == tenant

    async def test_leaving_gives_all_up(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await lead(catalog, "one", HERE)
        await catalog.claim_tenant(tenant.uid)
        await catalog.leave()
        await lead(second, "two", THERE)
        assert await second.claim_tenant(tenant.uid) == tenant

    async def test_a_heartbeat_keeps_what_is_held_and_tells_of_deletions(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await lead(catalog, "one", HERE)
        other = await catalog.create_tenant("other", "")
        for uid in (tenant.uid, other.uid, other.uid):
            assert await catalog.claim_tenant(uid) is not None
        assert await catalog.renew_server(LONG_S) == set()
        await catalog.delete_tenant(other.uid)
        assert await catalog.renew_server(LONG_S) == {other.uid}
        with pytest.raises(NotFoundError):
            await catalog.claim_tenant(other.uid)

    async def test_work_is_found_for_what_is_led_alone(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.upsert_model(model_row())
        other = await catalog.create_tenant("other", "")
        for owner in (tenant, other):
            await append(catalog, await make_memory(catalog, owner), [1])
            await make_memory(catalog, owner, "half", state=MemoryState.IMPORTING)
        await lead(catalog, "one", HERE)
        await lead(second, "two", HERE)
        await catalog.claim_tenant(tenant.uid)
        await second.claim_tenant(other.uid)
        for one, owner in ((catalog, tenant), (second, other)):
            assert [uid for uid, _, _ in await one.backlog("fake", 10)] == [owner.uid]
            assert list(await one.pending_by_tenant("fake")) == [owner.uid]
            importing = await one.memories_in_state(MemoryState.IMPORTING)
            assert [memory.tenant_uid for memory in importing] == [owner.uid]


class TestFence:
    """A server that was taken from, and does not know it yet."""

    @pytest.fixture
    async def outdated(self, catalog: Catalog, second: Catalog, tenant: TenantRow) -> Catalog:
        await catalog.upsert_model(model_row())
        await catalog.upsert_model(model_row("second", identity="identity-2", default=False))
        await append(catalog, await make_memory(catalog, tenant), [10, 20])
        await lead(catalog, "one", HERE)
        await catalog.claim_tenant(tenant.uid)
        await catalog.renew_server(OVER_S)
        await lead(second, "two", THERE)
        await second.claim_tenant(tenant.uid)
        return catalog

    async def test_nothing_of_it_commits(
        self, outdated: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        memory = await second.get_memory(tenant.uid, "memory")
        before = (memory, await second.list_encodings(memory.uid))
        uid = memory.uid
        # What the server that leads it remembers of keys and limits would not change with them.
        await make_key(second, tenant, "k1")
        keys = await second.list_api_keys(tenant.uid, 9)

        def no_record(*_: object) -> None:
            return None

        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: append(outdated, memory),
            lambda: outdated.commit_delete_documents(uid, memory.revision, [1], None),
            lambda: outdated.forget_removed(uid, [1]),
            lambda: make_memory(outdated, tenant, "another"),
            lambda: outdated.update_memory(tenant.uid, "memory", "name", None, None),
            lambda: outdated.begin_delete_memory(tenant.uid, "memory", None),
            lambda: outdated.finish_delete_memory(uid),
            lambda: outdated.activate_memory(uid),
            lambda: outdated.commit_import(uid, new_documents(memory, [1])),
            lambda: outdated.commit_import_revisions([RevisionRow(uid, 9, 1, 1, 0, 9)]),
            lambda: outdated.ensure_encoding(uid, "fake", "identity-9"),
            lambda: outdated.commit_encoded(uid, "fake", "identity-1", 2, 2, 5, 5, {}),
            lambda: outdated.rewind_encoding(uid, "fake", 1),
            lambda: outdated.fail_encoding(uid, "fake", "MODEL_MISMATCH"),
            lambda: outdated.commit_restore(uid, memory.revision, [1], None),
            lambda: outdated.commit_fork(memory, replace(memory, uid="m2"), None, no_record),
            lambda: outdated.attach_model(uid, "second"),
            lambda: outdated.detach_model(uid, "second"),
            lambda: outdated.update_tenant(tenant.tenant_id, default_model_id="second"),
            lambda: outdated.revoke_api_key(tenant.uid, "k1"),
            lambda: outdated.rotate_api_key(
                tenant.uid, "k1", new_key_id="k2", digest=b"d" * 32, grace_us=0, expires_us=None
            ),
            lambda: outdated.set_quotas(tenant.uid, {"concurrent_calls": 1}),
            lambda: outdated.begin_delete_tenant(tenant.uid),
            lambda: outdated.delete_tenant(tenant.uid),
        ]
        for call in calls:
            with pytest.raises(LeaseLostError):
                await call()
        assert (await second.get_memory(tenant.uid, "memory"), before[1]) == before
        assert await second.list_encodings(uid) == before[1]
        assert await second.list_api_keys(tenant.uid, 9) == keys
        assert await second.quotas(tenant.uid) == {}
        assert (await append(second, memory)).revision == memory.revision + 1

    async def test_what_is_not_there_is_still_told_as_such(
        self, outdated: Catalog, tenant: TenantRow
    ) -> None:
        with pytest.raises(NotFoundError):
            await outdated.attach_model("nothing", "fake")
        with pytest.raises(NotFoundError):
            await outdated.update_tenant("nobody", default_model_id="fake")

    async def test_it_may_lead_again_under_another_fence(
        self, outdated: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        await second.leave()
        await outdated.renew_server(LONG_S)
        assert await outdated.claim_tenant(tenant.uid) == tenant
        memory = await outdated.get_memory(tenant.uid, "memory")
        assert (await append(outdated, memory)).revision == memory.revision + 1

    async def test_a_lease_under_which_something_is_committed_is_not_to_be_had(
        self, catalog: Catalog, second: Catalog, tenant: TenantRow
    ) -> None:
        if catalog._database.is_sqlite:
            return  # One writer at a time.
        memory = await make_memory(catalog, tenant)
        await lead(catalog, "one", HERE)
        await catalog.claim_tenant(tenant.uid)
        await catalog.renew_server(OVER_S)
        await lead(second, "two", THERE)
        async with catalog._leading(memory_uid=memory.uid) as connection:
            # At once: its server may be stopped, and its transaction with it.
            assert await second.claim_tenant(tenant.uid) is None
            new = new_documents(memory, [7])
            await insert_documents(catalog._database, connection, memory.uid, new)
        assert await second.claim_tenant(tenant.uid) == tenant
        assert await second.live_numbers(memory.uid, 1, 9) == [1]
