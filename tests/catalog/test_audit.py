"""The audit trail: added to, read, and never changed without being noticed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import replace

import pytest
from sqlalchemy import Connection, text

from storage.catalog import (
    AuditRow,
    BrokenChainError,
    Catalog,
    TenantRow,
    current_revision,
    follow,
    migrate,
)
from storage.catalog.audit_chain import chain_digest
from storage.catalog.schema import head_revision, run_locked
from tests.support.catalogs import downgrade, open_catalog

KEY = b"k" * 32


async def act(catalog: Catalog, tenant_uid: str, number: int, key: bytes = KEY) -> AuditRow:
    return await catalog.add_audit(
        key, tenant_uid, "key", "DeleteMemory", resource=f"memories/m{number}", outcome="OK"
    )


async def chain(catalog: Catalog, tenant: TenantRow) -> list[AuditRow]:
    return await catalog.audit_chain(tenant.uid, 0, 1000)


class TestTrail:
    async def test_newest_first_by_tenant_page_by_page(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        made = [await act(catalog, tenant.uid, number) for number in range(5)]
        await act(catalog, "0" * 32, 9)
        first, before = await catalog.list_audit(tenant.uid, 3)
        second, end = await catalog.list_audit(tenant.uid, 3, before)
        assert first + second == made[::-1]
        assert end is None
        assert [row.sequence for row in made] == [1, 2, 3, 4, 5]
        assert await catalog.audited_tenants() == sorted(["0" * 32, tenant.uid])

    async def test_many_at_once_are_one_chain(self, catalog: Catalog, tenant: TenantRow) -> None:
        await asyncio.gather(*(act(catalog, tenant.uid, number) for number in range(12)))
        rows = await chain(catalog, tenant)
        assert [row.sequence for row in rows] == list(range(1, 13))
        last = follow(KEY, None, rows)
        assert last == rows[-1]

    async def test_those_of_one_server_do_not_get_in_each_others_way(
        self, catalog: Catalog, tenant: TenantRow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Tries are for entries of other servers, of which there are few at once."""
        monkeypatch.setattr("storage.catalog.audit._TRIES", 1)
        await asyncio.gather(*(act(catalog, tenant.uid, number) for number in range(12)))
        assert len(await chain(catalog, tenant)) == 12

    async def test_pieces_of_a_chain_follow_each_other(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        rows = [await act(catalog, tenant.uid, number) for number in range(4)]
        middle = follow(KEY, None, rows[:2])
        assert follow(KEY, middle, rows[2:]) == rows[3]
        assert follow(KEY, None, []) is None

    def test_the_catalog_has_no_way_to_change_or_delete_entries(self) -> None:
        named = [name for name, _ in inspect.getmembers(Catalog) if "audit" in name.lower()]
        assert sorted(named) == ["add_audit", "audit_chain", "audited_tenants", "list_audit"]


class TestAppendOnly:
    """The database itself refuses, whoever asks."""

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit SET actor = 'somebody else'",
            "UPDATE audit SET outcome = 'OK' WHERE sequence = 1",
            "DELETE FROM audit",
            "DELETE FROM audit WHERE sequence = 3",
        ],
    )
    async def test_neither_update_nor_delete(
        self, catalog: Catalog, catalog_url: str, tenant: TenantRow, statement: str
    ) -> None:
        made = [await act(catalog, tenant.uid, number) for number in range(3)]
        with pytest.raises(Exception, match="only added to"):
            await asyncio.to_thread(run_locked, catalog_url, _executes(statement))
        assert await chain(catalog, tenant) == made

    async def test_no_truncate(self, catalog: Catalog, catalog_url: str, tenant: TenantRow) -> None:
        if catalog_url.startswith("sqlite"):
            pytest.skip("SQLite has no TRUNCATE")
        await act(catalog, tenant.uid, 1)
        with pytest.raises(Exception, match="only added to"):
            await asyncio.to_thread(run_locked, catalog_url, _executes("TRUNCATE audit"))
        assert len(await chain(catalog, tenant)) == 1


def _executes(*statements: str) -> Callable[[Connection], None]:
    def work(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    return work


class TestTampering:
    """Somebody who owns the database takes the triggers away, and is found out."""

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE audit SET actor = 'somebody else' WHERE sequence = 3",
            "UPDATE audit SET action = 'GetMemory' WHERE sequence = 3",
            "UPDATE audit SET resource = 'memories/other' WHERE sequence = 3",
            "UPDATE audit SET outcome = 'MEMORY_NOT_FOUND' WHERE sequence = 3",
            "UPDATE audit SET at_us = at_us + 1 WHERE sequence = 3",
            "DELETE FROM audit WHERE sequence = 3",
            "DELETE FROM audit WHERE sequence < 3",
            "UPDATE audit SET sequence = 7 WHERE sequence = 3",
        ],
    )
    async def test_is_detected(
        self, catalog: Catalog, catalog_url: str, tenant: TenantRow, statement: str
    ) -> None:
        rows = [await act(catalog, tenant.uid, number) for number in range(5)]
        assert follow(KEY, None, await chain(catalog, tenant)) == rows[-1]
        if catalog_url.startswith("sqlite"):
            unlock = ["DROP TRIGGER audit_no_update", "DROP TRIGGER audit_no_delete"]
        else:
            unlock = ["ALTER TABLE audit DISABLE TRIGGER USER"]
        await asyncio.to_thread(run_locked, catalog_url, _executes(*unlock, statement))
        with pytest.raises(BrokenChainError):
            follow(KEY, None, await chain(catalog, tenant))

    async def test_without_the_key_a_chain_cannot_be_made_again(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        rows = [await act(catalog, tenant.uid, number) for number in range(3)]
        forged = replace(rows[0], actor="nobody")
        forged = replace(forged, digest=chain_digest(b"guessed" * 4, bytes(32), forged))
        with pytest.raises(BrokenChainError, match="entry 1 is not as it was written"):
            follow(KEY, None, [forged, *rows[1:]])
        with pytest.raises(BrokenChainError):
            follow(KEY, None, [rows[0], rows[2]])

    async def test_another_tenants_entry_does_not_fit(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        other = await act(catalog, "0" * 32, 1)
        with pytest.raises(BrokenChainError):
            follow(KEY, None, [replace(other, tenant_uid=tenant.uid)])


class TestMigration:
    async def test_down_and_up_with_data(self, catalog_url: str) -> None:
        async with open_catalog(catalog_url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            await act(catalog, tenant.uid, 1)
        await asyncio.to_thread(downgrade, catalog_url, "0004")
        # An entry as the version before wrote them.
        old = (
            "INSERT INTO audit (at_us, tenant_uid, actor, action, resource) "
            f"VALUES (1, '{tenant.uid}', 'key', 'DeleteTenant', 'tenants/x')"
        )
        await asyncio.to_thread(run_locked, catalog_url, _executes(old))
        await asyncio.to_thread(migrate, catalog_url)
        assert await asyncio.to_thread(current_revision, catalog_url) == head_revision()
        async with open_catalog(catalog_url) as catalog:
            first = await act(catalog, tenant.uid, 2)
            assert first.sequence == 1
            assert follow(KEY, None, await chain(catalog, tenant)) == first
        with pytest.raises(Exception, match="only added to"):
            await asyncio.to_thread(run_locked, catalog_url, _executes("DELETE FROM audit"))
