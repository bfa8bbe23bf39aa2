"""Engines, transactions and error translation for the two databases.

SQLite: WAL, synchronous FULL, foreign keys, and BEGIN IMMEDIATE for everything
that writes: a deferred BEGIN that later upgrades to a write fails at once with
"database is locked", whatever busy_timeout says. Writers of one process queue
on a lock of ours, because SQLite's own waiting sleeps and is unfair;
busy_timeout covers other processes.

PostgreSQL: read committed; writers lock the rows they change.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError as BadUrlError
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql.schema import Table

from storage.catalog.errors import CatalogError, CatalogFullError, CatalogUnavailableError

#: How long a writer waits for another process's transaction, and for a connection.
BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 10
#: How long PostgreSQL may take over one statement.
STATEMENT_TIMEOUT_S = 60

_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}

# PostgreSQL's SQLSTATE for "disk full" and SQLite's result codes.
_PG_DISK_FULL = "53100"
_SQLITE_CODES_FULL = {sqlite3.SQLITE_FULL}


def database_url(url: str) -> URL:
    """`url` with this package's driver: "sqlite:///FILE" or "postgresql://...".

    Raises CatalogError for any other database and for SQLite in memory, which
    would be another database on every connection.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
    except (BadUrlError, NoSuchModuleError) as error:
        raise CatalogError("the catalog's URL cannot be read") from error
    if backend not in _DRIVERS:
        raise CatalogError(f"the catalog runs on SQLite and PostgreSQL, not on {backend}")
    if backend == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise CatalogError("the catalog needs a file: an in-memory SQLite is not durable")
    return parsed.set(drivername=_DRIVERS[backend])


def sqlite_url(path: Path) -> str:
    """URL of the SQLite catalog at `path`."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def make_engine(
    url: URL,
    *,
    pool_size: int = 8,
    busy_timeout_s: int = BUSY_TIMEOUT_S,
    statement_timeout_s: int = STATEMENT_TIMEOUT_S,
) -> AsyncEngine:
    """An engine for `url` (of `database_url`); connects on first use."""
    if url.get_backend_name() == "postgresql":
        return create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=CONNECT_TIMEOUT_S,
            pool_pre_ping=True,
            hide_parameters=True,
            connect_args={"timeout": CONNECT_TIMEOUT_S, "command_timeout": statement_timeout_s},
        )
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        hide_parameters=True,
        connect_args={"timeout": busy_timeout_s},
    )
    prepare_sqlite(engine.sync_engine, foreign_keys=True)
    return engine


def prepare_sqlite(engine: Engine, *, foreign_keys: bool) -> None:
    """Makes a SQLite engine's connections and transactions what this catalog needs."""
    event.listen(engine, "connect", _sqlite_on_connect(foreign_keys))
    event.listen(engine, "begin", _sqlite_begin)


def _sqlite_on_connect(foreign_keys: bool) -> Any:
    def prepare(connection: Any, _record: object) -> None:
        # Python's driver would begin (deferred) by itself; _sqlite_begin does it.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        cursor.close()

    return prepare


def _sqlite_begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("catalog_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def translated_errors() -> Iterator[None]:
    """Turns what drivers and SQLAlchemy raise into catalog errors.

    IntegrityError passes: only the statement's author knows what it means.
    """
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        if _is_full(error):
            raise CatalogFullError("the catalog's disk is full") from error
        if _is_outage(error):
            raise CatalogUnavailableError("the catalog's database is not available") from error
        raise
    except (PoolTimeoutError, OSError, TimeoutError, asyncpg.PostgresError) as error:
        # asyncpg raises its own errors, and plain OSError, while connecting.
        raise CatalogUnavailableError("the catalog's database cannot be reached") from error


def _is_full(error: DBAPIError) -> bool:
    code = getattr(error.orig, "sqlite_errorcode", None)
    return code in _SQLITE_CODES_FULL or getattr(error.orig, "sqlstate", None) == _PG_DISK_FULL


def _is_outage(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None:
        primary = code & 0xFF
        return primary in {
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
            sqlite3.SQLITE_IOERR,
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
        }
    state = getattr(error.orig, "sqlstate", None)
    # 08 connection, 53 resources, 55P03 lock timeout, 57 operator intervention,
    # 58 system, 40 rollback (deadlock).
    return state is None or state[:2] in {"08", "53", "57", "58", "40"} or state == "55P03"


class Database:
    """Connections of one catalog: `reading` for queries, `writing` for a transaction."""

    def __init__(self, url: URL) -> None:
        self._engine = make_engine(url)
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._turn = asyncio.Lock()

    async def close(self) -> None:
        """Closes every connection; the database cannot be used afterwards."""
        await self._engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection whose statements see one snapshot on SQLite, the latest
        committed state each on PostgreSQL.
        """
        with translated_errors():
            async with self._engine.connect() as connection:
                if not self.is_sqlite:
                    # One statement each: saves the round trips of BEGIN and ROLLBACK.
                    await connection.execution_options(isolation_level="AUTOCOMMIT")
                yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction, committed durably at the end, rolled back on any error."""
        with translated_errors():
            if not self.is_sqlite:
                async with self._engine.begin() as connection:
                    yield connection
                return
            async with self._turn, self._engine.connect() as connection:
                await connection.execution_options(catalog_writes=True)
                async with connection.begin():
                    yield connection

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """INSERT with this database's ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)


__all__ = ["Database", "SQLAlchemyError", "database_url", "make_engine", "sqlite_url"]
