"""Every catalog test runs on SQLite and on PostgreSQL, on a migrated database of its own."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.catalog import Catalog, TenantRow, migrate, sqlite_url
from tests.support.catalogs import open_catalog
from tests.support.postgres import PostgresForTests, postgres

__all__ = ["postgres"]

DATABASES = ("sqlite", "postgresql")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "catalog.db"
    migrate(sqlite_url(path))
    return path


@pytest.fixture(scope="session")
def postgres_template(postgres: PostgresForTests) -> str:
    name = postgres.make_database()
    migrate(postgres.url(name))
    return name


@pytest.fixture(params=DATABASES)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "empty.db")
        return
    server: PostgresForTests = request.getfixturevalue("postgres")
    name = server.make_database()
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture(params=DATABASES)
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A migrated, empty database."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        yield sqlite_url(Path(shutil.copy(template, tmp_path / "catalog.db")))
        return
    server: PostgresForTests = request.getfixturevalue("postgres")
    name = server.make_database(request.getfixturevalue("postgres_template"))
    yield server.url(name)
    server.drop_database(name)


@pytest.fixture
async def catalog(catalog_url: str) -> AsyncIterator[Catalog]:
    async with open_catalog(catalog_url) as opened:
        yield opened


@pytest.fixture
async def tenant(catalog: Catalog) -> TenantRow:
    return await catalog.create_tenant("acme", "Acme")
