"""Migrations: up, down, up again with data, by several at once, and what they must match."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import BigInteger, Column, Connection, inspect, text

from storage.catalog import (
    Catalog,
    CatalogError,
    SchemaError,
    current_revision,
    migrate,
    sqlite_url,
)
from storage.catalog.schema import alembic_config, head_revision, run_locked
from storage.catalog.tables import metadata
from tests.support.catalogs import append, downgrade, make_memory, open_catalog


def table_names(url: str) -> set[str]:
    return run_locked(url, lambda connection: set(inspect(connection).get_table_names()))


def differences(connection: Connection) -> list[Any]:
    options = {"compare_type": True, "compare_server_default": True}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


class TestMigrations:
    def test_there_is_one_head_and_ids_count_up(self) -> None:
        script = ScriptDirectory.from_config(alembic_config())
        revisions = [entry.revision for entry in script.walk_revisions()][::-1]
        assert script.get_heads() == [head_revision()]
        assert revisions == [f"{number:04}" for number in range(1, len(revisions) + 1)]

    def test_up_down_up(self, empty_url: str) -> None:
        assert current_revision(empty_url) is None
        migrate(empty_url)
        assert current_revision(empty_url) == head_revision()
        assert table_names(empty_url) == set(metadata.tables) | {"alembic_version"}
        downgrade(empty_url, "base")
        assert current_revision(empty_url) is None
        assert table_names(empty_url) == {"alembic_version"}
        migrate(empty_url)
        assert table_names(empty_url) == set(metadata.tables) | {"alembic_version"}

    def test_tables_are_as_the_code_says(self, catalog_url: str) -> None:
        assert run_locked(catalog_url, differences) == []

    def test_a_difference_would_be_noticed(self, catalog_url: str) -> None:
        def alter(connection: Connection) -> list[Any]:
            connection.execute(text("DROP INDEX ix_encodings_waiting"))
            connection.execute(text("ALTER TABLE memories ADD COLUMN extra BIGINT"))
            return differences(connection)

        assert len(run_locked(catalog_url, alter)) == 2

    def test_check_constraints_are_as_the_code_says(self, catalog_url: str) -> None:
        # Alembic compares everything but these.
        def names(connection: Connection) -> set[str | None]:
            inspector = inspect(connection)
            tables = inspector.get_table_names()
            return {c["name"] for table in tables for c in inspector.get_check_constraints(table)}

        assert run_locked(catalog_url, names) == {
            "ck_api_keys_scope",
            "ck_encodings_pending",
            "ck_encodings_quarantined",
            "ck_encodings_sizes",
            "ck_memories_counters",
            "ck_memories_packing_mode",
            "ck_quotas_most",
            "ck_memories_state",
        }

    async def test_migrating_again_keeps_data_and_works_inside_a_loop(
        self, catalog_url: str
    ) -> None:
        async with open_catalog(catalog_url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            memory = await append(catalog, await make_memory(catalog, tenant))
            migrate(catalog_url)
            assert await catalog.get_memory(tenant.uid, "memory") == memory

    async def test_copying_a_table_keeps_what_refers_to_it(
        self, sqlite_template: Path, tmp_path: Path
    ) -> None:
        url = sqlite_url(Path(shutil.copy(sqlite_template, tmp_path / "catalog.db")))
        async with open_catalog(url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            memory = await append(catalog, await make_memory(catalog, tenant), [1] * 3)

        def alter(connection: Connection) -> None:
            operations = Operations(MigrationContext.configure(connection))
            with operations.batch_alter_table("memories", recreate="always") as batch:
                batch.add_column(Column("extra", BigInteger))

        await asyncio.to_thread(run_locked, url, alter)
        async with open_catalog(url) as catalog:
            assert await catalog.live_numbers(memory.uid, 1, 9) == [1, 2, 3]
            assert await catalog.get_memory(tenant.uid, "memory") == memory

    async def test_a_migration_that_breaks_references_is_undone(
        self, sqlite_template: Path, tmp_path: Path
    ) -> None:
        url = sqlite_url(Path(shutil.copy(sqlite_template, tmp_path / "catalog.db")))
        async with open_catalog(url) as catalog:
            tenant = await catalog.create_tenant("acme", "")
            await make_memory(catalog, tenant)

        def lose_tenants(connection: Connection) -> None:
            connection.execute(text("DELETE FROM tenants"))

        with pytest.raises(SchemaError, match="references"):
            await asyncio.to_thread(run_locked, url, lose_tenants)
        async with open_catalog(url) as catalog:
            assert await catalog.get_tenant("acme") == tenant

    def test_several_at_once_are_safe(self, empty_url: str) -> None:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(migrate, [empty_url] * 4))
        assert current_revision(empty_url) == head_revision()

    def test_several_processes_at_once_are_safe(self, empty_url: str, tmp_path: Path) -> None:
        # From another folder and without an alembic.ini, as an installed package runs.
        code = f"from storage.catalog import migrate; migrate({empty_url!r})"
        command_line = [sys.executable, "-c", code]
        running = [subprocess.Popen(command_line, cwd=tmp_path, env=os.environ) for _ in range(3)]
        assert [process.wait(60) for process in running] == [0, 0, 0]
        assert current_revision(empty_url) == head_revision()

    def test_a_failed_migration_leaves_nothing(self, empty_url: str) -> None:
        def half(connection: Connection) -> None:
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            raise RuntimeError("stopped")

        with pytest.raises(RuntimeError, match="stopped"):
            run_locked(empty_url, half)
        assert table_names(empty_url) == set()

    def test_offline_sql_is_written_for_both(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        root = Path(__file__).parents[2]
        for url in (f"sqlite:///{tmp_path}/x.db", "postgresql://host/name"):
            line = ["-m", "alembic.config", "-c", str(root / "migrations/alembic.ini")]
            done = subprocess.run(
                [sys.executable, *line, "-x", f"url={url}", "upgrade", "head", "--sql"],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=True,
            )
            assert "CREATE TABLE memories" in done.stdout
        assert not (tmp_path / "x.db").exists()


class TestOpen:
    async def test_an_empty_database_says_to_migrate(self, empty_url: str) -> None:
        with pytest.raises(SchemaError, match="memsvc migrate"):
            await Catalog.open(empty_url)

    async def test_an_unknown_revision_is_refused(self, catalog_url: str) -> None:
        def newer(connection: Connection) -> None:
            connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))

        await asyncio.to_thread(run_locked, catalog_url, newer)
        with pytest.raises(SchemaError, match="9999"):
            await Catalog.open(catalog_url)
        with pytest.raises(SchemaError, match="9999"):
            migrate(catalog_url)
        assert current_revision(catalog_url) == "9999"

    @pytest.mark.parametrize(
        "url",
        ["", "nonsense", "mysql://host/name", "oracle://h/n", "sqlite://", "sqlite:///:memory:"],
    )
    async def test_other_urls_are_refused(self, url: str) -> None:
        with pytest.raises(CatalogError):
            await Catalog.open(url)
        with pytest.raises(CatalogError):
            migrate(url)
