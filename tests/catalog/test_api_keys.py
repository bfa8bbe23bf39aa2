"""API keys."""

from __future__ import annotations

import asyncio

import pytest

from storage.catalog import (
    AlreadyExistsError,
    ApiKeyRow,
    Catalog,
    ConflictError,
    NotFoundError,
    Scope,
    TenantRow,
    current_revision,
    migrate,
)
from storage.catalog.schema import head_revision
from tests.support.catalogs import downgrade, make_key, make_memory, open_catalog

HOUR_US = 3_600_000_000


class TestApiKeys:
    async def test_is_found_with_its_tenant(self, catalog: Catalog, tenant: TenantRow) -> None:
        made = await catalog.create_api_key(
            "k1", tenant.uid, "laptop", Scope.ADMIN, True, b"\x00" * 32, 99
        )
        assert await catalog.find_api_key("k1") == made
        assert (made.tenant_id, made.scope, made.operator) == ("acme", Scope.ADMIN, True)
        assert (made.digest, made.expires_us, made.revoked_us) == (b"\x00" * 32, 99, None)

    async def test_unknown_key_is_none(self, catalog: Catalog) -> None:
        assert await catalog.find_api_key("nope") is None

    async def test_key_id_is_unique_across_tenants(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        await make_key(catalog, tenant, "k1")
        with pytest.raises(AlreadyExistsError):
            await make_key(catalog, other, "k1")

    async def test_unknown_tenant(self, catalog: Catalog) -> None:
        with pytest.raises(NotFoundError):
            await catalog.create_api_key("k", "0" * 32, "", Scope.READ, False, b"d", None)

    async def test_revoking_twice_keeps_the_first_time(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await make_key(catalog, tenant, "k1")
        first = await catalog.revoke_api_key(tenant.uid, "k1")
        assert first.revoked_us is not None
        assert await catalog.revoke_api_key(tenant.uid, "k1") == first
        assert await catalog.find_api_key("k1") == first

    async def test_another_tenants_key_cannot_be_revoked(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        await make_key(catalog, tenant, "k1")
        with pytest.raises(NotFoundError):
            await catalog.revoke_api_key(other.uid, "k1")
        found = await catalog.find_api_key("k1")
        assert found is not None
        assert found.revoked_us is None

    async def test_pages_of_one_tenant(self, catalog: Catalog, tenant: TenantRow) -> None:
        other = await catalog.create_tenant("other", "")
        for number in range(5):
            await make_key(catalog, tenant, f"k{number}")
            await make_key(catalog, other, f"other{number}")
        first, cursor = await catalog.list_api_keys(tenant.uid, 3)
        second, end = await catalog.list_api_keys(tenant.uid, 3, cursor)
        assert [key.key_id for key in first + second] == ["k4", "k3", "k2", "k1", "k0"]
        assert end is None

    async def test_memories_are_kept_as_given(self, catalog: Catalog, tenant: TenantRow) -> None:
        held = {"0" * 32: "anna", "1" * 32: "ben"}
        made = await catalog.create_api_key(
            "k1", tenant.uid, "", Scope.READ, False, b"d" * 32, None, held
        )
        assert made.memories == held
        assert await catalog.find_api_key("k1") == made
        await make_key(catalog, tenant, "k2")
        found = await catalog.find_api_key("k2")
        assert found is not None
        assert found.memories is None

    async def test_an_empty_list_of_memories_is_not_all_of_them(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await catalog.create_api_key("k1", tenant.uid, "", Scope.READ, False, b"d" * 32, None, {})
        found = await catalog.find_api_key("k1")
        assert found is not None
        assert found.memories == {}

    async def test_a_listing_may_be_limited_to_some_memories(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        made = [await make_memory(catalog, tenant, f"memory-{index}") for index in range(5)]
        wanted = [made[4].uid, made[2].uid, made[0].uid, "f" * 32]
        first, cursor = await catalog.list_memories(tenant.uid, 2, None, wanted)
        second, end = await catalog.list_memories(tenant.uid, 2, cursor, wanted)
        assert [memory.memory_id for memory in first + second] == [
            "memory-4",
            "memory-2",
            "memory-0",
        ]
        assert end is None
        assert await catalog.list_memories(tenant.uid, 2, None, []) == ([], None)


async def rotate(
    catalog: Catalog, old: ApiKeyRow, new_id: str, grace_us: int, expires_us: int | None = None
) -> tuple[ApiKeyRow, ApiKeyRow]:
    return await catalog.rotate_api_key(
        old.tenant_uid,
        old.key_id,
        new_key_id=new_id,
        digest=b"n" * 32,
        grace_us=grace_us,
        expires_us=expires_us,
    )


class TestRotation:
    async def test_the_new_key_may_do_what_the_old_one_may(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        old = await catalog.create_api_key(
            "k1", tenant.uid, "laptop", Scope.READ_WRITE, False, b"d" * 32, None, {"0" * 32: "anna"}
        )
        new, before = await rotate(catalog, old, "k2", HOUR_US)
        assert (new.scope, new.display_name, new.memories) == (
            old.scope,
            old.display_name,
            old.memories,
        )
        assert (new.digest, new.expires_us, new.revoked_us) == (b"n" * 32, None, None)
        assert before.revoked_us is not None
        assert before.revoked_us - new.created_us == HOUR_US
        assert await catalog.find_api_key("k1") == before

    async def test_without_grace_the_old_key_ends_now(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        old = await make_key(catalog, tenant, "k1")
        new, before = await rotate(catalog, old, "k2", 0)
        assert before.revoked_us == new.created_us
        with pytest.raises(ConflictError):
            await rotate(catalog, old, "k3", 0)
        assert await catalog.find_api_key("k3") is None

    async def test_the_new_key_lives_as_long_as_the_old_one_was_made_for(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        first = await make_key(catalog, tenant, "k0")
        ends = first.created_us + HOUR_US
        old = await catalog.create_api_key("k1", tenant.uid, "", Scope.READ, False, b"d" * 32, ends)
        life = ends - old.created_us
        new, _ = await rotate(catalog, old, "k2", 10 * HOUR_US)
        assert new.expires_us == new.created_us + life
        # The grace does not shorten what a second rotation gives.
        again, before = await rotate(catalog, old, "k3", 0)
        assert again.expires_us == again.created_us + life
        assert before.revoked_us == again.created_us

    async def test_an_expiry_may_be_given(self, catalog: Catalog, tenant: TenantRow) -> None:
        old = await make_key(catalog, tenant, "k1")
        new, _ = await rotate(catalog, old, "k2", 0, old.created_us + HOUR_US)
        assert new.expires_us == old.created_us + HOUR_US

    async def test_a_second_rotation_never_lengthens_the_grace(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        old = await make_key(catalog, tenant, "k1")
        _, before = await rotate(catalog, old, "k2", HOUR_US)
        _, after = await rotate(catalog, old, "k3", 2 * HOUR_US)
        assert after.revoked_us == before.revoked_us

    async def test_revoking_cuts_the_grace_short(self, catalog: Catalog, tenant: TenantRow) -> None:
        old = await make_key(catalog, tenant, "k1")
        _, before = await rotate(catalog, old, "k2", HOUR_US)
        revoked = await catalog.revoke_api_key(tenant.uid, "k1")
        assert revoked.revoked_us is not None
        assert before.revoked_us is not None
        assert revoked.revoked_us < before.revoked_us

    async def test_what_is_not_there_or_has_expired(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await catalog.create_tenant("other", "")
        old = await catalog.create_api_key("k1", tenant.uid, "", Scope.READ, False, b"d" * 32, 1)
        with pytest.raises(ConflictError):
            await rotate(catalog, old, "k2", 0)
        foreign = await make_key(catalog, other, "k3")
        for key_id in ("k3", "absent"):
            with pytest.raises(NotFoundError):
                await catalog.rotate_api_key(
                    tenant.uid,
                    key_id,
                    new_key_id="k4",
                    digest=b"",
                    grace_us=0,
                    expires_us=None,
                )
        assert await catalog.find_api_key("k3") == foreign

    async def test_two_at_once_are_two_keys(self, catalog: Catalog, tenant: TenantRow) -> None:
        old = await make_key(catalog, tenant, "k1")
        made = await asyncio.gather(
            rotate(catalog, old, "k2", HOUR_US), rotate(catalog, old, "k3", HOUR_US)
        )
        assert {new.key_id for new, _ in made} == {"k2", "k3"}
        keys, _ = await catalog.list_api_keys(tenant.uid, 10)
        assert len(keys) == 3


class TestMigration:
    async def test_going_back_ends_keys_of_some_memories(self, catalog_url: str) -> None:
        async with open_catalog(catalog_url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            await make_key(catalog, tenant, "whole")
            await catalog.create_api_key(
                "some", tenant.uid, "", Scope.READ, False, b"d" * 32, None, {"0" * 32: "anna"}
            )
        await asyncio.to_thread(downgrade, catalog_url, "0001")
        assert await asyncio.to_thread(current_revision, catalog_url) == "0001"
        await asyncio.to_thread(migrate, catalog_url)
        assert await asyncio.to_thread(current_revision, catalog_url) == head_revision()
        async with open_catalog(catalog_url) as catalog:
            assert await catalog.find_api_key("some") is None
            whole = await catalog.find_api_key("whole")
            assert whole is not None
            assert whole.memories is None
