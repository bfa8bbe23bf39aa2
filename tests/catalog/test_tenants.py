"""Tenants and API keys."""

from __future__ import annotations

import pytest

from storage.catalog import (
    AlreadyExistsError,
    Catalog,
    ConflictError,
    Cursor,
    NotFoundError,
    Scope,
    TenantRow,
)
from tests.support.catalogs import append, make_memory, request_record


async def make_key(
    catalog: Catalog, tenant: TenantRow, key_id: str, scope: Scope = Scope.READ
) -> None:
    await catalog.create_api_key(key_id, tenant.uid, "", scope, False, b"d" * 32, None)


class TestTenants:
    async def test_is_found_by_name(self, catalog: Catalog, tenant: TenantRow) -> None:
        assert await catalog.get_tenant("acme") == tenant
        assert tenant.display_name == "Acme"
        assert len(bytes.fromhex(tenant.uid)) == 16

    async def test_unknown_name(self, catalog: Catalog) -> None:
        with pytest.raises(NotFoundError):
            await catalog.get_tenant("nobody")

    async def test_name_is_taken(self, catalog: Catalog, tenant: TenantRow) -> None:
        with pytest.raises(AlreadyExistsError):
            await catalog.create_tenant("acme", "other")
        assert await catalog.get_tenant("acme") == tenant

    async def test_pages_newest_first_without_gap_or_repeat(self, catalog: Catalog) -> None:
        made = [await catalog.create_tenant(f"t{number}", "") for number in range(7)]
        seen: list[TenantRow] = []
        cursor: Cursor | None = None
        while True:
            page, cursor = await catalog.list_tenants(3, cursor)
            seen += page
            if cursor is None:
                break
        assert seen == made[::-1]

    async def test_a_full_last_page_ends_the_listing(self, catalog: Catalog) -> None:
        for number in range(3):
            await catalog.create_tenant(f"t{number}", "")
        page, cursor = await catalog.list_tenants(3)
        assert (len(page), cursor) == (3, None)

    async def test_a_limit_below_one_is_refused(self, catalog: Catalog) -> None:
        with pytest.raises(ValueError, match="limit 0"):
            await catalog.list_tenants(0)

    async def test_delete_takes_keys_usage_and_requests_along(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        await make_key(catalog, tenant, "k1")
        await catalog.add_usage(tenant.uid, queries=1)
        memory = await make_memory(catalog, tenant, request=request_record("r1"))
        await catalog.begin_delete_memory(tenant.uid, "memory", None)
        await catalog.finish_delete_memory(memory.uid)
        await catalog.audit(tenant.uid, "k1", "delete", "tenants/acme")
        await catalog.delete_tenant(tenant.uid)
        assert await catalog.find_api_key("k1") is None
        assert await catalog.find_request(tenant.uid, "r1") is None
        with pytest.raises(NotFoundError):
            await catalog.get_tenant("acme")
        assert [row.action for row in await catalog.audit_trail(tenant.uid, 10)] == ["delete"]
        assert (await catalog.create_tenant("acme", "")).uid != tenant.uid

    async def test_with_a_memory_it_stays(self, catalog: Catalog, tenant: TenantRow) -> None:
        memory = await make_memory(catalog, tenant)
        await append(catalog, memory)
        with pytest.raises(ConflictError):
            await catalog.delete_tenant(tenant.uid)
        await catalog.begin_delete_memory(tenant.uid, "memory", None)
        with pytest.raises(ConflictError):
            await catalog.delete_tenant(tenant.uid)
        assert await catalog.get_tenant("acme") == tenant

    async def test_delete_unknown(self, catalog: Catalog) -> None:
        with pytest.raises(NotFoundError):
            await catalog.delete_tenant("0" * 32)


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
