"""Bringing a database to this code's schema, and asking where it stands.

The migrations are the top-level package `migrations`; it imports this package's
tables, so it is found by name and only when something is to be migrated.
All of an upgrade is one transaction under one lock (PostgreSQL: an advisory
lock; SQLite: BEGIN IMMEDIATE), so several processes may start at once and a
failed upgrade leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, text

from storage.catalog.database import (
    database_url,
    make_postgres_engine,
    make_sqlite_engine,
    translated_errors,
)
from storage.catalog.errors import SchemaError
from storage.failpoints import Failpoint, reach

Result = TypeVar("Result")

#: Key of the advisory lock that migrations take on PostgreSQL.
ADVISORY_LOCK = 0x6D656D737663
#: How long one migration waits for another to end.
LOCK_WAIT_S = 120
#: PostgreSQL: how long a statement of a migration may wait for a table's lock. Whoever comes
#: after it queues behind it, so it gives up soon, with all of the upgrade, and is run again.
TABLE_LOCK_S = 5
#: How long one statement of a migration may take on PostgreSQL.
MIGRATION_S = 3600


def alembic_config() -> Config:
    """Alembic's configuration for the installed `migrations` package."""
    spec = find_spec("migrations")
    if spec is None or not spec.submodule_search_locations:
        raise SchemaError("the migrations package is not installed")
    config = Config()
    location = next(iter(spec.submodule_search_locations))
    config.set_main_option("script_location", location.replace("%", "%%"))
    return config


@cache
def head_revision() -> str:
    """The schema revision that this code needs. Raises SchemaError."""
    return only_head(ScriptDirectory.from_config(alembic_config()))


def only_head(script: ScriptDirectory) -> str:
    """The one revision that no other follows. Raises SchemaError where there is none, or where
    two lines of work each added one.
    """
    try:
        head = script.get_current_head()
    except CommandError as error:
        raise SchemaError(f"the migrations end in several revisions: {error}") from error
    if head is None:
        raise SchemaError("the migrations package holds no revision")
    return head


def migrate(url: str) -> None:
    """Upgrades the database at `url` to this code's schema; nothing to do is no error.

    Blocks; safe to call from several processes at once. Raises SchemaError if the
    database is of a newer or unknown revision, CatalogUnavailableError, CatalogError.
    """

    def upgrade(connection: Connection) -> None:
        config = alembic_config()
        _check_known(connection, config)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        reach(Failpoint.MIGRATE_UNCOMMITTED)

    run_locked(url, upgrade)
    reach(Failpoint.MIGRATE_COMMITTED)


def current_revision(url: str) -> str | None:
    """The schema revision of the database at `url`; None if it was never migrated."""
    target = database_url(url)
    if target.get_backend_name() == "sqlite" and not Path(target.database or "").exists():
        # Connecting would make an empty file.
        return None
    return run_locked(url, _revision_of)


def require_head(connection: Connection) -> None:
    """Raises SchemaError unless the connection's database is at this code's revision."""
    current = _revision_of(connection)
    if current != head_revision():
        raise SchemaError(
            f"the catalog's schema is at revision {current}, this version needs "
            f"{head_revision()}: run `memsvc migrate`"
        )


def _revision_of(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _check_known(connection: Connection, config: Config) -> None:
    current = _revision_of(connection)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if current is not None and current not in known:
        raise SchemaError(f"the catalog's schema revision {current} is not known to this version")


def run_locked(url: str, work: Callable[[Connection], Result]) -> Result:
    """Runs `work` in one transaction that no other migration overlaps; blocks.

    SQLite's foreign keys are off in it: a batch migration drops and renames
    tables, which would delete what refers to them. They are checked at the end.
    """

    target = database_url(url)
    with translated_errors():
        if target.get_backend_name() == "sqlite":
            return _on_sqlite(target, work)
        # asyncpg has no blocking form. A thread of its own: the caller may be inside a loop.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(asyncio.run, _on_postgres(target, work)).result()


def _on_sqlite(url: URL, work: Callable[[Connection], Result]) -> Result:
    engine = make_sqlite_engine(url, foreign_keys=False, busy_timeout_s=LOCK_WAIT_S)
    try:
        with engine.execution_options(catalog_writes=True).begin() as connection:
            result = work(connection)
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if broken:
                raise SchemaError(f"the migration broke {len(broken)} references: undone")
            return result
    finally:
        engine.dispose()


async def _on_postgres(url: URL, work: Callable[[Connection], Result]) -> Result:
    engine = make_postgres_engine(url, pool_size=1, statement_timeout_s=MIGRATION_S)
    try:
        async with engine.begin() as connection:
            await connection.execute(text(f"SET LOCAL lock_timeout = '{LOCK_WAIT_S}s'"))
            lock = text("SELECT pg_advisory_xact_lock(:key)")
            await connection.execute(lock, {"key": ADVISORY_LOCK})
            await connection.execute(text(f"SET LOCAL lock_timeout = '{TABLE_LOCK_S}s'"))
            await connection.execute(text(f"SET LOCAL statement_timeout = '{MIGRATION_S}s'"))
            return await connection.run_sync(work)
    finally:
        await engine.dispose()
