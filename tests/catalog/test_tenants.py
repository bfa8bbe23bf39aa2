"""Tenants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storage.catalog import (
    AlreadyExistsError,
    Catalog,
    ConflictError,
    Cursor,
    NotFoundError,
    TenantRow,
)
from tests.support.catalogs import append, make_key, make_memory, request_record


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
        await catalog.add_audit(
            b"key", tenant.uid, "k1", "delete", resource="tenants/acme", outcome="OK"
        )
        await catalog.delete_tenant(tenant.uid)
        assert await catalog.find_api_key("k1") is None
        assert await catalog.find_request(tenant.uid, "r1") is None
        with pytest.raises(NotFoundError):
            await catalog.get_tenant("acme")
        assert [row.action for row in await catalog.audit_chain(tenant.uid, 0, 10)] == ["delete"]
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


async def test_a_tenant_that_is_being_deleted_gets_no_further_memory(
    catalog: Catalog, tenant: TenantRow
) -> None:
    memory = await append(catalog, await make_memory(catalog, tenant), [1])
    await catalog.begin_delete_tenant(tenant.uid)
    with pytest.raises(NotFoundError):
        await make_memory(catalog, tenant, "more")
    child = replace(memory, uid="cd" * 16, memory_id="forked")
    with pytest.raises(NotFoundError):
        await catalog.commit_fork(memory, child, None, lambda *_: None)
    assert [row.memory_id for row in (await catalog.list_memories(tenant.uid, 10))[0]] == ["memory"]
