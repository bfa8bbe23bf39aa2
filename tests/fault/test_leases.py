"""Two server processes over one PostgreSQL: the one that leads is killed, or stopped for a while.

The client knows both addresses and nothing of who leads.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from memsvc.client import AsyncClient, RetryPolicy, Turn, UnavailableError
from memsvc.client.retry import NO_RETRIES
from storage.catalog.database import database_url, make_postgres_engine
from tests.fault.judge import read_memory
from tests.fault.ledger import Ledger, problems
from tests.support.live import LiveServer
from tests.support.postgres import PostgresForTests, run_postgres
from tests.support.served import NO_WORKER

_MEMORY = "shared"
_PATIENT = RetryPolicy(attempts=100, initial_s=0.05, ceiling_s=0.5)
_LEASE_S = 1.0


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresForTests]:
    yield from run_postgres()


class Cluster:
    """Servers of one catalog, told apart by their logs. The first one started leads."""

    def __init__(self, postgres: PostgresForTests, stack: ExitStack) -> None:
        self.home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="memsvc-leases-")))
        self._postgres = postgres
        self.database = postgres.make_database()
        self._stack = stack

    def server(self, name: str, folder: str = "data") -> LiveServer:
        """Started; on the shared data folder unless told."""
        logs = self.home / name
        logs.mkdir()
        options = ("--worker-address", NO_WORKER, "--set", f"lease_s={_LEASE_S}")
        url = self._postgres.url(self.database)
        server = LiveServer(self.home / folder, options=options, logs=logs, database_url=url)
        self._stack.callback(server.kill)
        server.start()
        return server

    async def value(self, sql: str) -> Any:
        """The one value that a query of the catalog gives."""
        engine = make_postgres_engine(database_url(self._postgres.url(self.database)), pool_size=1)
        try:
            async with engine.connect() as connection:
                return (await connection.execute(text(sql))).scalar_one()
        finally:
            await engine.dispose()


@pytest.fixture
def cluster(postgres: PostgresForTests) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(postgres, stack)


@asynccontextmanager
async def client_of(
    *servers: LiveServer, retry: RetryPolicy = _PATIENT
) -> AsyncIterator[AsyncClient]:
    address = "ipv4:" + ",".join(server.address for server in servers)
    async with AsyncClient(address, servers[0].api_key, retry=retry) as client:
        yield client


class Writing:
    """A writer that appends turn by turn and repeats each until it is acknowledged."""

    def __init__(self, client: AsyncClient) -> None:
        self.ledger = Ledger(_MEMORY, "w")
        self._client = client
        self._acked = asyncio.Event()
        self._go_on()

    def _go_on(self) -> None:
        self._stop = False
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stop:
            [turn] = self.ledger.send(1)
            written = await self._client.memory(_MEMORY).append(
                [Turn("user", turn)], request_id=turn.replace(" ", "-"), timeout_s=120
            )
            self.ledger.acknowledge([turn], written.documents, written.revision)
            self._acked.set()

    async def more(self, count: int) -> None:
        """Returns when so many more are acknowledged."""
        if self._stop:
            self._go_on()
        goal = self.ledger.acknowledged + count
        while self.ledger.acknowledged < goal:
            self._acked.clear()
            waiting = asyncio.create_task(self._acked.wait())
            await asyncio.wait({waiting, self._task}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self._task.done():
                self._task.result()

    async def pause(self) -> None:
        """Returns when no append is in flight. `more` goes on."""
        self._stop = True
        await self._task

    async def finish(self) -> None:
        """Stops after the append in flight; every turn must be there once and in order."""
        await self.pause()
        stored = await read_memory(self._client, _MEMORY)
        assert problems([self.ledger], stored) == []
        assert len(stored) == self.ledger.acknowledged


async def refused_by(server: LiveServer) -> bool:
    """Whether the server says that another one leads the tenant."""
    async with client_of(server, retry=NO_RETRIES) as client:
        try:
            await client.memories.get(_MEMORY)
        except UnavailableError as error:
            assert error.reason == "SERVED_ELSEWHERE"
            assert error.retry_after_s
            return True
    return False


async def test_one_that_is_stopped_keeps_its_tenant_and_one_that_is_killed_loses_it(
    cluster: Cluster,
) -> None:
    first = await asyncio.to_thread(cluster.server, "first")
    second = await asyncio.to_thread(cluster.server, "second")
    async with client_of(first, second) as client:
        await client.memories.create(_MEMORY)
        assert await refused_by(second)
        writing = Writing(client)
        await writing.more(10)
        first.process.send_signal(signal.SIGSTOP)
        try:
            await ended(cluster, 1)
            # Its row has ended and its process has not: it may write as soon as it goes on.
            assert await refused_by(second)
        finally:
            first.process.send_signal(signal.SIGCONT)
        await writing.more(10)
        assert await refused_by(second)
        await asyncio.to_thread(first.kill)
        await writing.more(10)
        # One that comes back finds its tenant led by the other.
        await asyncio.to_thread(first.start)
        assert await refused_by(first)
        assert not await refused_by(second)
        await writing.finish()


async def test_one_that_was_taken_from_while_stopped_commits_nothing(cluster: Cluster) -> None:
    """On storage of its own the lock says nothing, and what is left is the fence."""
    first = await asyncio.to_thread(cluster.server, "first")
    async with client_of(first, retry=NO_RETRIES) as client:
        await client.memories.create(_MEMORY)
        writing = Writing(client)
        await writing.more(5)
        await asyncio.to_thread(shutil.copytree, first.folder, cluster.home / "other")
        second = await asyncio.to_thread(cluster.server, "second", "other")
        assert await refused_by(second)
        await writing.pause()
        first.process.send_signal(signal.SIGSTOP)
        try:
            await ended(cluster, 1)
            await served_by(second)
            state = "SELECT revision || '/' || version FROM memories"
            before = await cluster.value(state)
        finally:
            first.process.send_signal(signal.SIGCONT)
        with pytest.raises(UnavailableError) as refusal:
            await writing.more(1)
        assert refusal.value.reason == "SERVED_ELSEWHERE"
        assert await cluster.value(state) == before
    assert await refused_by(first)


async def served_by(server: LiveServer) -> None:
    """Returns when the server leads the tenant."""
    while True:
        if not await refused_by(server):
            return
        await asyncio.sleep(0.1)


async def ended(cluster: Cluster, count: int) -> None:
    """Returns when so many servers have not renewed their row in time."""
    over = "expires_us < extract(epoch FROM clock_timestamp()) * 1000000"
    while True:
        if await cluster.value(f"SELECT count(*) FROM servers WHERE {over}") >= count:
            return
        await asyncio.sleep(0.1)
