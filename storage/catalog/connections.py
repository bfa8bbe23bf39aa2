"""Connections of one catalog, and the threads in which they are used.

asyncpg is asynchronous by itself. SQLite's library blocks, and handing every
statement to a thread and back costs more than the statement. So the catalog's
methods, written once as coroutines, run on SQLite as a whole in a thread:
nothing in them waits there, and one hop carries a transaction. Writers share one
thread, which is their queue; readers have a few.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, CursorResult, Engine, Executable
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.schema import Table

from storage.catalog.database import (
    IDLE_TRANSACTION_S,
    make_postgres_engine,
    make_sqlite_engine,
    translated_errors,
)
from storage.catalog.errors import CatalogUnavailableError
from storage.failpoints import Failpoint, reach

#: Threads that read SQLite, each with a connection.
READERS = 4

Result = TypeVar("Result")
Values = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Statements:
    """Runs statements on one connection of either kind."""

    def __init__(self, connection: Connection | AsyncConnection) -> None:
        self._connection = connection

    async def execute(
        self, statement: Executable, values: Values | None = None
    ) -> CursorResult[Any]:
        """Runs a statement; with a sequence of values once for each."""
        if isinstance(self._connection, Connection):
            return self._connection.execute(statement, values)
        return await self._connection.execute(statement, values)

    async def exec_driver_sql(
        self, statement: str, values: tuple[Any, ...] | None = None
    ) -> CursorResult[Any]:
        """Runs SQL as the driver takes it."""
        if isinstance(self._connection, Connection):
            return self._connection.exec_driver_sql(statement, values)
        return await self._connection.exec_driver_sql(statement, values)

    async def run_sync(self, work: Callable[[Connection], Result]) -> Result:
        """Runs a function that needs a blocking connection."""
        if isinstance(self._connection, Connection):
            return work(self._connection)
        return await self._connection.run_sync(work)


class Database:
    """Connections of one catalog: `reading` for queries, `writing` for a transaction.

    Both are used only inside a coroutine that `run` runs.
    """

    def __init__(self, url: URL) -> None:
        self.is_sqlite = url.get_backend_name() == "sqlite"
        self._closed = False
        self._async_engine: AsyncEngine | None = None
        if self.is_sqlite:
            self.engine = make_sqlite_engine(url)
        else:
            self._async_engine = make_postgres_engine(url, idle_transaction_s=IDLE_TRANSACTION_S)
            self.engine = self._async_engine.sync_engine
        self._writers = ThreadPoolExecutor(1, "catalog-writer")
        self._readers = ThreadPoolExecutor(READERS, "catalog-reader")
        self._writing_engine: Engine = self.engine.execution_options(catalog_writes=True)

    async def run(self, method: Coroutine[Any, Any, Result], *, writes: bool) -> Result:
        """Runs a method of the catalog where it may block. Raises CatalogUnavailableError
        after `close`.
        """
        if self._closed:
            method.close()
            raise CatalogUnavailableError("the catalog is closed")
        if self._async_engine is not None:
            return await method
        threads = self._writers if writes else self._readers
        return await asyncio.get_running_loop().run_in_executor(threads, _to_its_end, method)

    async def close(self) -> None:
        """Closes every connection once running methods have ended."""
        self._closed = True
        for threads in (self._writers, self._readers):
            await asyncio.to_thread(threads.shutdown)
        if self._async_engine is not None:
            await self._async_engine.dispose()
        else:
            self.engine.dispose()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[Statements]:
        """A connection to query: one snapshot on SQLite, on PostgreSQL the latest
        committed state for each statement.
        """
        with translated_errors():
            if self._async_engine is None:
                with self.engine.connect() as blocking:
                    yield Statements(blocking)
                return
            async with self._async_engine.connect() as connection:
                # Saves the round trips of BEGIN and ROLLBACK.
                await connection.execution_options(isolation_level="AUTOCOMMIT")
                yield Statements(connection)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Statements]:
        """A transaction, committed durably at the end, rolled back on any error."""
        with translated_errors():
            if self._async_engine is None:
                with self._writing_engine.begin() as blocking:
                    yield Statements(blocking)
                    reach(Failpoint.CATALOG_UNCOMMITTED)
            else:
                async with self._async_engine.begin() as connection:
                    yield Statements(connection)
                    reach(Failpoint.CATALOG_UNCOMMITTED)
            reach(Failpoint.CATALOG_COMMITTED)

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """INSERT with this database's ON CONFLICT."""
        return sqlite.insert(table) if self.is_sqlite else postgresql.insert(table)


def _to_its_end(method: Coroutine[Any, Any, Result]) -> Result:
    """Runs a coroutine that never waits, without an event loop."""
    try:
        method.send(None)
    except StopIteration as stop:
        result: Result = stop.value
        return result
    method.close()
    raise RuntimeError("a method of the catalog waited, in a thread without an event loop")
