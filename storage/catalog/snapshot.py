"""Copies of a catalog: taken at one moment beside a running server, and put back.

A copy is a SQLite catalog whatever the database is, so a backup of a PostgreSQL catalog
needs no pg_dump and restores to either. While writers are held off, for as long as it
takes to begin a transaction, the caller may take what belongs to that moment elsewhere:

    SQLite      BEGIN IMMEDIATE keeps writers out; a reader's transaction in WAL keeps the view
    PostgreSQL  LOCK memories IN EXCLUSIVE MODE: every write that changes what exists takes a
                row of it first; a REPEATABLE READ transaction keeps the view

Then writers go on, and the rows are copied out of the view.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

from sqlalchemy import URL, Connection, Engine, func, insert, select, text

from storage.catalog.database import (
    database_url,
    make_postgres_engine,
    make_sqlite_engine,
    sqlite_url,
    translated_errors,
)
from storage.catalog.errors import CatalogError
from storage.catalog.schema import migrate, require_head
from storage.catalog.tables import leases, memories, metadata, servers, tenants

T = TypeVar("T")

_ROWS = 1000
#: How long writers may hold the backup off, and the backup them.
_LOCK_WAIT_S = 30
_COPY_S = 3600


def copy_catalog(url: str, target: Path, meanwhile: Callable[[], T]) -> T:
    """Makes a SQLite catalog at `target` of what the catalog at `url` holds at one moment,
    at which it calls `meanwhile`; returns what that returned. Blocks.

    Raises SchemaError unless the catalog is of this code's revision, CatalogError.
    """
    migrate(sqlite_url(target))
    source = database_url(url)
    with translated_errors():
        if source.get_backend_name() == "sqlite":
            return _from_sqlite(source, target, meanwhile)
        # asyncpg has no blocking form. A thread of its own: the caller may be inside a loop.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(asyncio.run, _from_postgres(source, target, meanwhile)).result()


def put_catalog(file: Path, url: str) -> None:
    """Fills the empty catalog at `url` with the rows of the SQLite catalog `file`, both of
    this code's revision. Blocks; all of it or nothing. Raises CatalogError when it is not empty.
    """
    target = database_url(url)

    def put(connection: Connection) -> None:
        if connection.execute(select(func.count()).select_from(tenants)).scalar_one():
            raise CatalogError("the catalog to be filled is not empty")
        with _sqlite(database_url(sqlite_url(file))) as engine, engine.connect() as source:
            _copy_rows(source, connection)
        if connection.dialect.name == "postgresql":
            _advance_sequences(connection)

    with translated_errors():
        if target.get_backend_name() == "sqlite":
            with _sqlite(target) as engine, _writing(engine).begin() as connection:
                put(connection)
            return
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(asyncio.run, _on_postgres(target, put)).result()


def _from_sqlite(source: URL, target: Path, meanwhile: Callable[[], T]) -> T:
    with _sqlite(source) as engine, engine.connect() as view:
        with _writing(engine).connect() as lock, lock.begin():
            require_head(view)
            view.execute(select(func.count()).select_from(memories))
            result = meanwhile()
        _copy_out(view, target)
        return result


async def _from_postgres(source: URL, target: Path, meanwhile: Callable[[], T]) -> T:
    engine = make_postgres_engine(source, pool_size=2, statement_timeout_s=_COPY_S)
    try:
        async with engine.connect() as view:
            await view.execution_options(
                isolation_level="REPEATABLE READ", postgresql_readonly=True
            )
            async with engine.begin() as lock:
                await lock.execute(text(f"SET LOCAL lock_timeout = '{_LOCK_WAIT_S}s'"))
                await lock.execute(text("LOCK TABLE memories IN EXCLUSIVE MODE"))
                await view.run_sync(require_head)
                result = meanwhile()
            await view.run_sync(_copy_out, target)
            return result
    finally:
        await engine.dispose()


async def _on_postgres(target: URL, work: Callable[[Connection], None]) -> None:
    engine = make_postgres_engine(target, pool_size=1, statement_timeout_s=_COPY_S)
    try:
        async with engine.begin() as connection:
            await connection.run_sync(work)
    finally:
        await engine.dispose()


@contextmanager
def _sqlite(url: URL) -> Iterator[Engine]:
    engine = make_sqlite_engine(url, busy_timeout_s=_LOCK_WAIT_S)
    try:
        yield engine
    finally:
        engine.dispose()


def _writing(engine: Engine) -> Engine:
    return engine.execution_options(catalog_writes=True)


def _copy_out(view: Connection, target: Path) -> None:
    with (
        _sqlite(database_url(sqlite_url(target))) as engine,
        _writing(engine).begin() as connection,
    ):
        _copy_rows(view, connection)


def _copy_rows(source: Connection, target: Connection) -> None:
    """Every row of every table, parents first, but for those that belong to running servers."""
    for table in metadata.sorted_tables:
        if table in {servers, leases}:
            continue
        with closing(source.execution_options(yield_per=_ROWS).execute(select(table))) as rows:
            for some in rows.mappings().partitions():
                target.execute(insert(table), [dict(row) for row in some])


def _advance_sequences(connection: Connection) -> None:
    """Rows brought their own numbers; the next ones must be new."""
    for table in metadata.sorted_tables:
        column = table.autoincrement_column
        if column is not None and connection.execute(select(func.max(column))).scalar():
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            highest = select(func.max(column)).scalar_subquery()
            connection.execute(select(func.setval(sequence, highest)))
