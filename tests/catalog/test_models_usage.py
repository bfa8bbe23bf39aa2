"""Models and usage counters."""

from __future__ import annotations

import asyncio

import pytest

from storage.catalog import Catalog, NotFoundError, TenantRow, UsageRow
from tests.support.catalogs import append, make_memory, model_row


class TestModels:
    async def test_is_read_as_written(self, catalog: Catalog) -> None:
        assert await catalog.default_model() is None
        model = model_row("one")
        await catalog.upsert_model(model)
        assert await catalog.get_model("one") == model
        assert await catalog.default_model() == model
        with pytest.raises(NotFoundError):
            await catalog.get_model("two")

    async def test_the_last_default_wins(self, catalog: Catalog) -> None:
        await catalog.upsert_model(model_row("one"))
        await catalog.upsert_model(model_row("two"))
        assert await catalog.default_model() == model_row("two")
        assert await catalog.get_model("one") == model_row("one", default=False)

    async def test_is_replaced_in_place(self, catalog: Catalog) -> None:
        await catalog.upsert_model(model_row("one"))
        newer = model_row("one", identity="identity-2", default=False, seen_us=9)
        await catalog.upsert_model(newer)
        assert await catalog.list_models(5) == ([newer], None)

    async def test_pages_by_name(self, catalog: Catalog) -> None:
        for model_id in ("c", "a", "e", "b", "d"):
            await catalog.upsert_model(model_row(model_id, default=False))
        first, cursor = await catalog.list_models(3)
        rest, end = await catalog.list_models(3, cursor)
        assert [row.model_id for row in first + rest] == ["a", "b", "c", "d", "e"]
        assert end is None


class TestUsage:
    async def test_starts_at_zero(self, catalog: Catalog, tenant: TenantRow) -> None:
        assert await catalog.usage(tenant.uid) == UsageRow(0, 0, 0, 0, 0, 0, 0, 0)

    async def test_adds_up_also_when_concurrent(self, catalog: Catalog, tenant: TenantRow) -> None:
        await asyncio.gather(
            *(catalog.add_usage(tenant.uid, 1, 2, answer_tokens=3) for _ in range(20))
        )
        await catalog.add_usage(tenant.uid, encoded_tokens=5)
        assert await catalog.usage(tenant.uid) == UsageRow(0, 0, 0, 0, 20, 40, 60, 5)

    async def test_a_tenant_that_is_gone_is_not_counted(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        """An answer, or a batch, that ends after its tenant was deleted."""
        await catalog.add_usage(tenant.uid, 1, 2)
        await catalog.delete_tenant(tenant.uid)
        await catalog.add_usage(tenant.uid, 1, 2)
        assert await catalog.usage(tenant.uid) == UsageRow(0, 0, 0, 0, 0, 0, 0, 0)

    async def test_counts_what_is_held_now(self, catalog: Catalog, tenant: TenantRow) -> None:
        other = await catalog.create_tenant("other", "")
        await catalog.upsert_model(model_row())
        for owner in (tenant, other):
            memory = await append(catalog, await make_memory(catalog, owner, "one"), [10, 20])
            await catalog.commit_encoded(memory.uid, "fake", "identity-1", 2, 2, 5, 700, {})
        await append(catalog, await make_memory(catalog, tenant, "two"), [5])
        assert await catalog.usage(tenant.uid) == UsageRow(2, 3, 35, 700, 0, 0, 0, 0)
        await catalog.begin_delete_memory(tenant.uid, "one", None)
        assert await catalog.usage(tenant.uid) == UsageRow(1, 1, 5, 0, 0, 0, 0, 0)
