"""How methods run: to their end, in threads on SQLite, and not after closing."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest
from sqlalchemy.engine import make_url

from storage.catalog import Catalog, CatalogUnavailableError, TenantRow
from storage.catalog.base import CatalogPart, reads, wall_clock_us, writes
from storage.catalog.connections import Database
from tests.support.catalogs import make_memory


class Probe(CatalogPart):
    """Says where it runs, and waits where it must not."""

    @reads
    async def reading_thread(self) -> str:
        return threading.current_thread().name

    @writes
    async def writing_thread(self) -> str:
        return threading.current_thread().name

    @reads
    async def waits(self) -> None:
        await asyncio.sleep(0)


class TestThreads:
    async def test_sqlite_never_blocks_the_loop(self, catalog: Catalog) -> None:
        probe = Probe(catalog._database, wall_clock_us)
        here = threading.current_thread().name
        threads = {(await probe.reading_thread())[:14], (await probe.writing_thread())[:14]}
        expected = {"catalog-reader", "catalog-writer"} if catalog._database.is_sqlite else {here}
        assert {name[:14] for name in threads} == {name[:14] for name in expected}

    async def test_waiting_in_a_thread_is_a_mistake_that_shows(self, tmp_path: Path) -> None:
        database = Database(make_url(f"sqlite+pysqlite:///{tmp_path}/x.db"))
        with pytest.raises(RuntimeError, match="waited"):
            await Probe(database, wall_clock_us).waits()
        await database.close()

    async def test_readers_go_on_while_a_writer_waits_for_its_lock(
        self, catalog: Catalog, tenant: TenantRow, catalog_url: str
    ) -> None:
        if not catalog._database.is_sqlite:
            pytest.skip("PostgreSQL has no such lock")
        other = sqlite3.connect(make_url(catalog_url).database or "", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        writers = [asyncio.create_task(catalog.add_usage(tenant.uid, 1)) for _ in range(20)]
        try:
            assert (await catalog.get_tenant("acme")) == tenant
            assert not any(writer.done() for writer in writers)
        finally:
            other.execute("COMMIT")
            other.close()
        await asyncio.gather(*writers)
        assert (await catalog.usage(tenant.uid)).queries == 20


class TestEnd:
    async def test_a_cancelled_call_ends_before_it_is_cancelled(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        creating = asyncio.create_task(make_memory(catalog, tenant))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert (await catalog.get_memory(tenant.uid, "memory")).revision == 0

    async def test_a_call_that_never_began_does_nothing(
        self, catalog: Catalog, tenant: TenantRow
    ) -> None:
        creating = asyncio.create_task(make_memory(catalog, tenant))
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert await catalog.list_memories(tenant.uid, 1) == ([], None)

    async def test_after_closing_nothing_runs(self, catalog: Catalog, tenant: TenantRow) -> None:
        await catalog.close()
        with pytest.raises(CatalogUnavailableError):
            await catalog.get_tenant("acme")
        with pytest.raises(CatalogUnavailableError):
            await make_memory(catalog, tenant)
        await catalog.close()
