"""When the database is away, busy or full: one typed error, and work goes on afterwards."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import DBAPIError

from storage.catalog import (
    Catalog,
    CatalogFullError,
    CatalogUnavailableError,
    connections,
    current_revision,
    migrate,
    sqlite_url,
)
from storage.catalog.database import (
    BUSY_TIMEOUT_S,
    IDLE_TRANSACTION_S,
    make_sqlite_engine,
    translated_errors,
)
from tests.support.catalogs import append, make_memory, open_catalog
from tests.support.postgres import PostgresForTests, run_postgres


@pytest.fixture
def sqlite_path(sqlite_template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(sqlite_template, tmp_path / "catalog.db"))


@pytest.fixture
def own_postgres() -> Iterator[PostgresForTests]:
    """A server that a test may stop."""
    yield from run_postgres()


class TestSqlite:
    async def test_settings_that_durability_needs(self, sqlite_path: Path) -> None:
        names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        async with (
            open_catalog(sqlite_url(sqlite_path)) as catalog,
            catalog._database.reading() as connection,
        ):
            values = {
                name: (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar()
                for name in names
            }
        assert values == {
            "journal_mode": "wal",
            "synchronous": 2,
            "foreign_keys": 1,
            "busy_timeout": BUSY_TIMEOUT_S * 1000,
        }

    async def test_a_writer_waits_for_another_process(self, sqlite_path: Path) -> None:
        other = sqlite3.connect(sqlite_path, isolation_level=None)
        async with open_catalog(sqlite_url(sqlite_path)) as catalog:
            other.execute("BEGIN IMMEDIATE")
            writing = asyncio.create_task(catalog.create_tenant("acme", ""))
            await asyncio.sleep(0.2)
            assert not writing.done()
            # Readers do not wait.
            assert await catalog.list_tenants(1) == ([], None)
            other.execute("COMMIT")
            other.close()
            assert (await writing).tenant_id == "acme"

    async def test_waiting_ends(self, sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        impatient = functools.partial(make_sqlite_engine, busy_timeout_s=0)
        monkeypatch.setattr(connections, "make_sqlite_engine", impatient)
        other = sqlite3.connect(sqlite_path, isolation_level=None)
        async with open_catalog(sqlite_url(sqlite_path)) as catalog:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(CatalogUnavailableError):
                await catalog.create_tenant("acme", "")
            other.close()
            await catalog.create_tenant("acme", "")

    async def test_a_full_database_is_told_apart_and_loses_nothing(self, sqlite_path: Path) -> None:
        async with open_catalog(sqlite_url(sqlite_path)) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            memory = await append(catalog, await make_memory(catalog, tenant))
            await self._limit_pages(catalog, 60)
            with pytest.raises(CatalogFullError):
                await append(catalog, memory, [1] * 50_000)
            assert await catalog.get_memory(tenant.uid, "memory") == memory
            await self._limit_pages(catalog, 1_000_000)
            assert (await append(catalog, memory)).revision == 2

    async def _limit_pages(self, catalog: Catalog, pages: int) -> None:
        # The limit belongs to a connection; one at a time is in use here.
        async with catalog._database.reading() as connection:
            await connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    async def test_a_missing_folder(self, tmp_path: Path) -> None:
        url = sqlite_url(tmp_path / "no" / "catalog.db")
        with pytest.raises(CatalogUnavailableError):
            await Catalog.open(url)
        with pytest.raises(CatalogUnavailableError):
            migrate(url)

    def test_asking_an_absent_database_makes_none(self, tmp_path: Path) -> None:
        path = tmp_path / "catalog.db"
        assert current_revision(sqlite_url(path)) is None
        assert not path.exists()


class TestPostgres:
    async def test_a_stopped_server_is_unavailable_and_its_return_is_noticed(
        self, own_postgres: PostgresForTests
    ) -> None:
        url = own_postgres.url(own_postgres.make_database())
        migrate(url)
        async with open_catalog(url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            memory = await make_memory(catalog, tenant)
            own_postgres.stop()
            with pytest.raises(CatalogUnavailableError):
                await catalog.ping()
            with pytest.raises(CatalogUnavailableError):
                await append(catalog, memory)
            with pytest.raises(CatalogUnavailableError):
                await Catalog.open(url)
            own_postgres.start()
            assert await catalog.get_memory(tenant.uid, "memory") == memory
            assert (await append(catalog, memory)).revision == 1

    async def test_a_connection_cut_in_a_transaction_rolls_back(
        self, postgres: PostgresForTests, postgres_template: str
    ) -> None:
        name = postgres.make_database(postgres_template)
        async with open_catalog(postgres.url(name)) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            memory = await make_memory(catalog, tenant)
            cut = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{name}' AND pid <> pg_backend_pid();"
            )
            writing = asyncio.create_task(append(catalog, memory, [1] * 200_000))
            await asyncio.sleep(0.7)
            await asyncio.to_thread(postgres.execute, cut)
            with pytest.raises(CatalogUnavailableError):
                await writing
            assert await catalog.get_memory(tenant.uid, "memory") == memory
        postgres.drop_database(name)

    async def test_nobody_listens(self, tmp_path: Path) -> None:
        with pytest.raises(CatalogUnavailableError):
            await Catalog.open(f"postgresql://user@/name?host={tmp_path}")
        with pytest.raises(CatalogUnavailableError):
            await Catalog.open("postgresql://user@127.0.0.1:1/name")

    async def test_a_transaction_that_stands_still_will_be_ended(
        self, postgres: PostgresForTests, postgres_template: str
    ) -> None:
        name = postgres.make_database(postgres_template)
        setting = "SHOW idle_in_transaction_session_timeout"
        async with (
            open_catalog(postgres.url(name)) as catalog,
            catalog._database.writing() as connection,
        ):
            assert (await connection.exec_driver_sql(setting)).scalar() == f"{IDLE_TRANSACTION_S}s"
        postgres.drop_database(name)


class TestTranslation:
    @pytest.mark.parametrize(
        ("state", "expected"),
        [
            ("53100", CatalogFullError),
            ("08006", CatalogUnavailableError),
            ("40P01", CatalogUnavailableError),
            ("57P01", CatalogUnavailableError),
            ("55P03", CatalogUnavailableError),
            ("42601", DBAPIError),
            ("22003", DBAPIError),
        ],
    )
    def test_sqlstates(self, state: str, expected: type[Exception]) -> None:
        class DriverError(Exception):
            sqlstate = state

        with pytest.raises(expected) as caught, translated_errors():
            raise DBAPIError("SELECT", {}, DriverError())
        assert caught.type is expected

    def test_an_os_error_means_not_reachable(self) -> None:
        with pytest.raises(CatalogUnavailableError), translated_errors():
            raise ConnectionRefusedError(os.strerror(111))
