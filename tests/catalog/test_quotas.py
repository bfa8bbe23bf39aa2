from __future__ import annotations

import pytest

from storage.catalog import Catalog, NotFoundError, TenantRow


async def test_limits_are_set_changed_and_taken_away(catalog: Catalog, tenant: TenantRow) -> None:
    assert await catalog.quotas(tenant.uid) == {}
    await catalog.set_quotas(tenant.uid, {"a": 1, "b": 2})
    await catalog.set_quotas(tenant.uid, {"b": 10**15, "c": 3, "a": 0})
    assert await catalog.quotas(tenant.uid) == {"b": 10**15, "c": 3}
    await catalog.set_quotas(tenant.uid, {})
    assert await catalog.quotas(tenant.uid) == {"b": 10**15, "c": 3}


async def test_they_are_the_tenants_alone_and_go_with_it(
    catalog: Catalog, tenant: TenantRow
) -> None:
    other = await catalog.create_tenant("other", "")
    await catalog.set_quotas(tenant.uid, {"a": 1})
    await catalog.set_quotas(other.uid, {"a": 2})
    await catalog.delete_tenant(tenant.uid)
    assert await catalog.quotas(tenant.uid) == {}
    assert await catalog.quotas(other.uid) == {"a": 2}
    with pytest.raises(NotFoundError):
        await catalog.set_quotas(tenant.uid, {"a": 1})
