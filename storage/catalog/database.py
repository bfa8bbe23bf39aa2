"""Engines and error translation for the two databases.

SQLite: WAL, synchronous FULL, foreign keys, and BEGIN IMMEDIATE for everything
that writes: a deferred BEGIN that later upgrades to a write fails at once with
"database is locked", whatever busy_timeout says. Writers of one process queue for
one thread (connections.py), because SQLite's own waiting sleeps and is unfair;
busy_timeout covers other processes.

PostgreSQL: read committed; writers lock the rows they change.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncpg
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError as BadUrlError
from sqlalchemy.exc import DBAPIError, IntegrityError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from storage.catalog.errors import CatalogError, CatalogFullError, CatalogUnavailableError

#: How long a writer waits for another process's transaction, and for a connection.
BUSY_TIMEOUT_S = 10
CONNECT_TIMEOUT_S = 10
#: How long PostgreSQL may take over one statement.
STATEMENT_TIMEOUT_S = 60
#: How long a transaction may stand still, as one does whose process was stopped: then PostgreSQL
#: ends it, and whoever waits for its locks goes on.
IDLE_TRANSACTION_S = 30

_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+asyncpg"}

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


def is_shared(url: str) -> bool:
    """Whether several server processes may use the catalog at `url`. Raises CatalogError."""
    return database_url(url).get_backend_name() != "sqlite"


def sqlite_url(path: Path) -> str:
    """URL of the SQLite catalog at `path`."""
    return URL.create("sqlite", database=str(path)).render_as_string()


def make_postgres_engine(
    url: URL,
    *,
    pool_size: int = 8,
    statement_timeout_s: int = STATEMENT_TIMEOUT_S,
    idle_transaction_s: int = 0,
) -> AsyncEngine:
    """An engine for a PostgreSQL `url` of `database_url`; connects on first use.

    idle_transaction_s: 0 for no limit.
    """
    idle = {"idle_in_transaction_session_timeout": f"{idle_transaction_s}s"}
    return create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        pool_pre_ping=True,
        # No value of a statement gets into an error's text.
        hide_parameters=True,
        connect_args={
            "timeout": CONNECT_TIMEOUT_S,
            "command_timeout": statement_timeout_s,
            "server_settings": idle,
        },
    )


def _log_ahead(connection: sqlite3.Connection, patience_s: float) -> None:
    """SQLite does not wait where several change a new database to WAL at once."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def make_sqlite_engine(
    url: URL, *, foreign_keys: bool = True, busy_timeout_s: float = BUSY_TIMEOUT_S
) -> Engine:
    """A blocking engine for a SQLite `url` of `database_url`; connects on first use.

    Transactions begin immediately where the option catalog_writes is set.
    """
    engine = create_engine(
        url,
        pool_size=8,
        max_overflow=0,
        pool_timeout=CONNECT_TIMEOUT_S,
        hide_parameters=True,
        connect_args={"timeout": busy_timeout_s, "check_same_thread": False},
    )

    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        # Python's driver would begin (deferred) by itself; `begin` does it.
        connection.isolation_level = None
        _log_ahead(connection, busy_timeout_s)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("catalog_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    event.listen(engine, "connect", prepare)
    event.listen(engine, "begin", begin)
    return engine


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
